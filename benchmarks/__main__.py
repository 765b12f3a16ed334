"""``make bench``: the CPU figures, then those of scale."""

from benchmarks import cpu, scale

if __name__ == "__main__":
    cpu.main()
    scale.main([])
