"""Each rank gets its share of every tensor, whatever the layout on disk and however the bytes lie."""

import pytest
import torch

from common.model.checkpoint import Checkpoint, load_role
from common.model.config import load_config
from common.model.cuts import Cut, cut_checkpoint
from common.service.errors import CheckpointError
from tests.checkpoints import make_checkpoint

NUM_RANKS = 2
# By the end of a parameter's name: dimension, slots. Each kind of cut, experts among them.
CUTS = {
    "q_proj.weight": (-2, 1),
    "o_proj.weight": (-1, 1),
    "experts.gate_up_proj": (-2, 2),
    "experts.down_proj": (-1, 1),
    "lm_head.weight": (-2, 1),
}


def cuts_of(parameters, rank):
    return {
        name: Cut(dim, parameter.shape[dim], rank, NUM_RANKS, num_slots)
        for name, parameter in parameters.items()
        for ending, (dim, num_slots) in CUTS.items()
        if name.endswith(ending)
    }


def share(parameter, cut):
    """By hand: every slot in equal pieces, the last one shorter."""
    pieces = [slot.split(cut.share, cut.dim)[cut.rank] for slot in parameter.chunk(cut.num_slots, cut.dim)]
    return torch.cat(pieces, cut.dim)


@pytest.mark.parametrize("staging", [None, 1024], ids=["", "small staging buffer"])
@pytest.mark.parametrize("long_run", [None, 1], ids=["", "each run alone"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["hf", "hf_legacy"])  # experts in two tensors, or three for each
def test_every_rank_gets_its_share(tmp_path, monkeypatch, layout, dtype, long_run, staging):
    if staging is not None:
        monkeypatch.setattr("common.model.checkpoint.STAGING_BYTES", staging)
    if long_run is not None:
        monkeypatch.setattr("common.model.checkpoint._LONG_RUN_BYTES", long_run)
    made = make_checkpoint(tmp_path, layout=layout, text="qwen3_moe", dtype=dtype, shards=2, vocab_size=515)
    whole = Checkpoint.open(tmp_path)
    full = made.parameters("language")
    num_bytes_read = 0
    for rank in range(NUM_RANKS):
        cuts = cuts_of(full, rank)
        expected = {name: share(value, cuts[name]) if name in cuts else value for name, value in full.items()}
        found = {name: torch.full_like(value, float("nan")) for name, value in expected.items()}
        mine = cut_checkpoint(whole, cuts)
        load_role(mine, load_config(tmp_path), "language", found)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        num_bytes_read += mine.tensor_bytes_read
    everybodys = sum(value.numel() for name, value in full.items() if name not in cuts)
    total = sum(value.numel() for value in full.values())
    assert num_bytes_read == (total + everybodys * (NUM_RANKS - 1)) * dtype.itemsize


def test_a_tensor_that_somebody_else_holds_is_not_missed(tmp_path):
    made = make_checkpoint(tmp_path)
    parameters = {name: torch.empty_like(value) for name, value in made.parameters("language").items()}
    del parameters["model.embed_tokens.weight"]
    mine = cut_checkpoint(Checkpoint.open(tmp_path), {}, without={"model.embed_tokens.weight"})
    load_role(mine, load_config(tmp_path), "language", parameters)
    assert all(torch.equal(value, made.parameters("language")[name]) for name, value in parameters.items())


def test_a_tensor_of_another_length_is_named(tmp_path):
    make_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"tensor '.*lm_head.weight' .*: expected length 600 along dimension -2"):
        cut_checkpoint(Checkpoint.open(tmp_path), {"lm_head.weight": Cut(-2, 600, 0, NUM_RANKS)})


def test_ranks_beyond_the_last_row_hold_none():
    cuts = [Cut(-2, 5, rank, 4) for rank in range(4)]
    assert [(cut.start, cut.stop) for cut in cuts] == [(0, 2), (2, 4), (4, 5), (5, 5)]
    assert [cut.local for cut in cuts] == [2, 2, 1, 0]
