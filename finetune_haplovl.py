"""Stage 2 from this checkout; see `megatron_haplovl/finetune.py`."""

from megatron_haplovl.finetune import main

if __name__ == "__main__":
    main()
