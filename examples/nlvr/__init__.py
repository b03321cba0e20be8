"""NLVR (Suhr et al., ACL 2017) as training data: see README.md in this folder."""
