"""What the job runs on the driver node: the command line, ``curator-embed``, with the job's parameters."""

from curator_embed.cli import main

if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        # Databricks judges a script by what it raises, and has taken a SystemExit of status 0 for a failure too.
        if end.code:
            raise RuntimeError(f"curator-embed ended with exit status {end.code}; what it said is above") from None
