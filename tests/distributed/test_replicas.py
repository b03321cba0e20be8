"""--check-replicas: one flipped bit in one rank's weights is found and laid at the right door, in every layout."""

from __future__ import annotations

import json

from tests.distributed.launch import run_ranks
from tests.distributed.worker_replicas import LAYOUTS, SPLIT, WHOLE


def test_a_flipped_bit_is_found(tmp_path):
    run_ranks("worker_replicas.py", 2, str(tmp_path))
    answers = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for name in LAYOUTS:
        words, *found = answers[0][name]
        assert found == answers[1][name][1:], "all ranks say the same"
        cases = [(WHOLE, 0), (WHOLE, 1), (SPLIT, 0), (SPLIT, 1)]
        if name.startswith(("DP 2, ZeRO 3", "PP 2")):
            why = "every weight is on one rank only" if "PP" in name else "ZeRO 3 holds every weight once"
            assert words == f"--check-replicas: {why}, so nothing is compared"
            assert set(found) == {"nothing was raised"}, name
            continue
        assert words.startswith("--check-replicas: every 2 steps and before every save, "), words
        assert words.endswith("ZeRO 3 holds the others once") == ("ZeRO 3" in name)
        for (parameter, rank), sentence in zip(cases, found, strict=True):
            if name.startswith("TP") and parameter == SPLIT:
                assert sentence == "nothing was raised", "each rank has its own part"
                continue
            known = "ZeRO 0" not in name and "ZeRO 3" not in name
            said = (
                f"{parameter} on rank {rank} differs from the other ranks' copy; that points to the memory of its "
                "machine"
                if known
                else f"{parameter} differs between the ranks 0, 1, and nothing says which of them is right"
            )
            consequence = "nothing was saved" if rank == 0 else "the weights were not updated"
            number = 1 if rank == 0 else 2
            assert sentence.startswith(f"step {number}: {said}; {consequence}. "), (name, sentence)
