"""Stage 1 from this checkout; see `megatron_haplovl/pretrain.py`."""

from megatron_haplovl.pretrain import main

if __name__ == "__main__":
    main()
