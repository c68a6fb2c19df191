"""All that needs a GPU, in steps that resume: see `benchmarks/gpu.sh -h`. Each step is rehearsed on any machine by `--tiny`."""
