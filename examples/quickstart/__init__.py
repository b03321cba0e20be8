"""A demo data set of rendered scenes: see examples/quickstart.sh."""
