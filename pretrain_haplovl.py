"""Stage 1 from this checkout; see `megatron_haplovl/pretrain.py`."""

from megatron_haplovl.operation.signals import StopSignals
from megatron_haplovl.parallel.launch import Launch

if __name__ == "__main__":
    # Before the libraries are loaded, which takes a while: from here on a signal ends the run with a sentence.
    signals = StopSignals(Launch.of_environment())
    from megatron_haplovl.pretrain import main

    main(signals)
