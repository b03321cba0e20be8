"""Readers of the files that public data comes in, one module per kind. :mod:`.inputs` chooses between them."""
