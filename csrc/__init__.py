"""C++ and CUDA sources of dhns_fast, built on first use (dhns_fast.ops.build)."""
