"""Bytes from anywhere: local files, S3, GCS, Azure, HTTP; many small reads; what a row may name and what not."""
