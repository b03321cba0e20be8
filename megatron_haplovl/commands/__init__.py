"""The commands around a training: `haplovl-preprocess`, `-convert`, `-evaluate`, `-generate` and `-plan`.

From a checkout they are also started by the scripts in `tools/`.
"""
