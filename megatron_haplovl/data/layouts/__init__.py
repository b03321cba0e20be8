"""From a record of any public layout to the one internal record (`data/records.py`)."""
