"""What a reader of the paper can skip; run as `python -m extras.NAME`."""
