"""From records to the files of a prefix: processes, parts, pictures, videos, and joining them."""
