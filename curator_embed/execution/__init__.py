"""A run: its plan, the pipeline on each worker, pairing, output and resume, Dask clients, the report."""
