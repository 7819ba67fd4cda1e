"""Each modern switch: free when off, right when on, the same with a cache, in chunks, ragged, packed or compiled."""

import itertools

import pytest
import torch

from nanochat.checkpoint_manager import Checkpoint, load_weights
from nanochat.generate.kv_cache import KVCache
from nanochat.gpt import GPT, NANOCHAT_2026, GPTConfig
from nanochat.ops.pointwise import offset_keys
from nanochat.scoring import Span, score_groups

SWITCHES = {
    "residual_scalars": {"residual_scalars": True},
    "residual_factors": {"residual_factors": True},
    "no softcap": {"logit_softcap": None},
    "value_embeddings": {"value_embeddings": True},
    "smear": {"smear": True},
    "backout": {"backout": True},
    "qk_scale": {"qk_scale": 1.2},
    "rope_base": {"rope_base": 100000.0},
    "key_offset": {"key_offset": True},
    "init": {"init": "modern"},
    "window": {"window_pattern": "SSSL"},
    "recall": {"recall": 5000},
    "modern": NANOCHAT_2026 | {"window_pattern": "SL", "recall": 5000, "key_offset": True},
}
each_switch = pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
# 600 tokens, so that a short window is 256 tokens.
CONTEXT = 600


def switched(switch, seed=0, **shape):
    """A model whose zero parameters are random too, so that every switch has an effect."""
    torch.manual_seed(seed)
    settings = {"sequence_len": CONTEXT, "vocab_size": 90, "n_layer": 3, "n_head": 2, "n_kv_head": 1, "n_embd": 64}
    model = GPT(GPTConfig(**settings | shape | switch))
    model.init_weights()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.count_nonzero() == 0 or "gate" in name:
                p.normal_(0.0, 0.5)
        if model.config.recall:
            model.recall.scale.normal_(0.0, 2.0)
            text = tokens(1, model.config.recall, seed=3)[0]
            text[:200] = tokens(2, 300)[0, 50:250]  # some of the tests' own, so that long matches are found
            model.recall.carry(text.to(torch.int32).numpy())
    return model.eval()


def tokens(rows, n, seed=1):
    return torch.randint(0, 90, (rows, n), generator=torch.Generator().manual_seed(seed))


def looked_up(model, *parts):
    """What a loader gives a model with recall beside these texts, which stand in one row; None to others."""
    return torch.cat([model.recall.look_up(part) for part in parts], dim=1) if model.config.recall else None


@each_switch
@torch.no_grad()
def test_a_cache_changes_nothing_whether_in_chunks_or_token_by_token(switch):
    model, x = switched(switch), tokens(2, 300)
    whole = model(x)
    cache = KVCache.for_model(model, 2, CONTEXT, torch.float32)
    parts = [model(part, kv_cache=cache) for part in x.split([1, 150, 2, 140, 1, 1, 5], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-5, rtol=1e-4)


@each_switch
@torch.no_grad()
def test_rows_of_different_lengths_in_one_cache(switch):
    model = switched(switch)
    lengths = [3, 290, 150]
    x = tokens(3, 310)
    cache = KVCache.for_model(model, 3, CONTEXT, torch.float32)
    model(x[:, : max(lengths)], kv_cache=cache)  # padded on the right
    cache.set_lengths(lengths)
    rows = torch.arange(3)[:, None]
    at = torch.tensor(lengths)[:, None]
    got = [model(x[rows, at + i], kv_cache=cache) for i in range(3)]
    got.append(model(x[rows, at + 3 + torch.arange(4)], kv_cache=cache))
    got = torch.cat(got, dim=1)  # (3, 7, V)
    for row, n in enumerate(lengths):
        expected = model(x[row : row + 1, : n + 7])[:, n:]
        torch.testing.assert_close(got[row : row + 1], expected, atol=2e-5, rtol=1e-4)
    cache.swap(0, 2)  # rows 2, 1, 0, of which the last one has left
    cache.select(0, 2)
    after = model(x[[2, 1], [157, 297]][:, None], kv_cache=cache)
    torch.testing.assert_close(after[1:], model(x[1:2, :298])[:, -1:], atol=2e-5, rtol=1e-4)
    copy = KVCache.for_model(model, 3, CONTEXT, torch.float32)
    copy.prefill(cache)
    copy.select(0, 2)
    again = model(x[[2, 1], [158, 298]][:, None], kv_cache=copy)
    torch.testing.assert_close(again[:1], model(x[2:3, :159])[:, -1:], atol=2e-5, rtol=1e-4)
    copy.select(2, 3)
    copy.copy(1, 2, 299)  # row 2 begins like row 1
    shared = model(x[1:2, 299:300], kv_cache=copy)
    torch.testing.assert_close(shared, model(x[1:2, :300])[:, -1:], atol=2e-5, rtol=1e-4)


@each_switch
def test_scores_of_choices_with_a_shared_start_are_those_of_each_alone(switch):
    model, start = switched(switch), tokens(1, 40)[0].tolist()
    spans = [Span([*start, *tokens(1, n, seed=n)[0].tolist()], 40, 40 + n) for n in (3, 5)]
    together = score_groups(model, [spans])
    alone = [score for span in spans for score in score_groups(model, [[span]])]
    assert [score.mean_nats for score in together] == pytest.approx([score.mean_nats for score in alone], abs=1e-5)


def test_a_record_of_before_is_read_unless_it_has_what_is_gone():
    record = GPTConfig.from_depth(2, 300).to_dict()
    assert GPTConfig.from_dict(record | {"bigram_buckets": 0}) == GPTConfig.from_dict(record)
    with pytest.raises(ValueError, match="unknown to this version: bigram_buckets"):
        GPTConfig.from_dict(record | {"bigram_buckets": 65536})


@each_switch
def test_packed_segments_are_computed_as_if_alone(switch):
    model, x, y = switched(switch), tokens(1, 600), tokens(1, 600, seed=2)
    lengths = [310, 1, 289]
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    packed = model(x, y, loss_reduction="sum", segments=segments)
    pairs = zip(x.split(lengths, dim=1), y.split(lengths, dim=1), strict=True)
    alone = sum(model(a, b, loss_reduction="sum") for a, b in pairs)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=0)
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(packed, parameters), torch.autograd.grad(alone, parameters), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5 * float(b.abs().max()), rtol=1e-4)


@each_switch
def test_every_parameter_learns_and_checkpointing_changes_nothing(switch):
    model, x, y = switched(switch), tokens(2, 64), tokens(2, 64, seed=2)
    parameters = list(model.parameters())
    plain = torch.autograd.grad(model(x, y), parameters)
    assert all(g.count_nonzero() > 0 for g in plain)
    model.activation_checkpointing = True
    for a, b in zip(torch.autograd.grad(model(x, y), parameters), plain, strict=True):
        torch.testing.assert_close(a, b)


@each_switch
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(switch, dtype):
    model, x = switched(switch), tokens(2, 300)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", dtype=dtype):
            half = model(x)
            cache = KVCache.for_model(model, 2, CONTEXT, torch.float32)
            cached = torch.cat([model(part, kv_cache=cache) for part in x.split([290, 10], dim=1)], dim=1)
    error = 0.06 if dtype == torch.bfloat16 else 0.01
    assert (half - exact).norm() / exact.norm() < error
    assert (cached - exact).norm() / exact.norm() < error


@each_switch
def test_the_layers_compile_into_one_graph(switch):
    model, x = switched(switch), tokens(2, 300)
    torch._dynamo.reset()
    compiled = torch.compile(model.hidden, dynamic=False, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, found=looked_up(model, x)), model.hidden(x))


@pytest.mark.parametrize(
    "name", [name for name in SWITCHES if name not in ("init", "rope_base", "qk_scale", "key_offset", "no softcap")]
)
def test_a_switch_adds_parameters_only_when_on(name):
    with torch.device("meta"):
        classic = set(GPT(GPTConfig(n_layer=3)).state_dict())
        model = GPT(GPTConfig(n_layer=3, **SWITCHES[name]))
    added = set(model.state_dict()) - classic
    assert bool(added) == (name != "window")
    assert classic <= set(model.state_dict())


def test_offset_keys_have_the_slow_channels_of_the_token_before():
    k = torch.randn(2, 5, 3, 8)  # (B, T, H, D)
    first = torch.zeros(2, 5, dtype=torch.bool)
    first[1, 3] = True
    got = offset_keys(k, first)
    for b, t, channel in itertools.product(range(2), range(5), range(8)):
        lent = channel % 4 >= 2  # in each half, which rotate together, the second half
        if not lent:
            expected = k[b, t, :, channel]
        elif t == 0 or first[b, t]:
            expected = torch.zeros(3)
        else:
            expected = k[b, t - 1, :, channel]
        assert torch.equal(got[b, t, :, channel], expected)
    assert torch.equal(offset_keys(k)[0], got[0])


@torch.no_grad()
def test_a_cache_of_the_other_kind_is_refused():
    model = switched({"key_offset": True})
    c = model.config
    with pytest.raises(ValueError, match="key_offset"):
        model(tokens(1, 3), kv_cache=KVCache(1, c.n_kv_head, 8, c.head_dim, c.n_layer))
    with pytest.raises(ValueError, match="key_offset"):
        KVCache(1, 1, 8, 4, 1).prefill(KVCache(1, 1, 8, 4, 1, key_offset=True))


@torch.no_grad()
def test_the_switches_by_hand():
    """A one-layer model whose block does nothing: what remains is the switches' own arithmetic."""
    c = {"n_layer": 1, "n_head": 1, "n_kv_head": 1}
    model = switched({"residual_scalars": True, "smear": True, "backout": True}, **c)
    block = model.blocks[0]
    block.attn.c_proj.weight.zero_()
    block.mlp.c_proj.weight.zero_()
    x = tokens(1, 5)
    e = torch.nn.functional.rms_norm(model.wte(x), (64,), eps=1e-6)
    gate = model.smear_lambda * torch.sigmoid(e[:, 1:, :24] @ model.smear_gate.weight.t())
    e = torch.cat([e[:, :1], e[:, 1:] + gate * e[:, :-1]], dim=1)
    e = (model.resid_lambdas[0] + model.x0_lambdas[0]) * e
    e = e - model.backout_lambda * e
    torch.testing.assert_close(model.hidden(x), torch.nn.functional.rms_norm(e, (64,), eps=1e-6), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_softcap_of_zero_is_none_and_bounds_nothing():
    free, capped = switched({"logit_softcap": 0.0}), switched({"logit_softcap": 3.0})
    assert free.config == switched({"logit_softcap": None}).config
    x = tokens(1, 50)
    assert free(x).abs().max() > 3
    torch.testing.assert_close(capped(x), 3 * torch.tanh(free(x) / 3))


@torch.no_grad()
def test_residual_factors_by_hand():
    """Whatever is learned they stay above 0, and they scale the stream that a layer gets."""
    model = switched({"residual_factors": True}, n_layer=2)
    model.resid_logs.copy_(torch.tensor([-30.0, 0.5]))
    factors = model.resid_logs.exp()
    assert (factors > 0).all()
    x, context = tokens(1, 5), model._context(tokens(1, 5), None, None)
    stream = factors[1] * model.blocks[0](factors[0] * model.embed(x), context)
    expected = torch.nn.functional.rms_norm(model.blocks[1](stream, context), (64,), eps=1e-6)
    torch.testing.assert_close(model.hidden(x), expected)


def test_windows_and_value_embeddings_fall_on_the_layers_of_nanochat():
    config = GPTConfig(2048, n_layer=6, window_pattern="SSSL", value_embeddings=True)
    assert config.windows == [512, 512, 512, None, 512, None]
    assert [config.has_value_embedding(i) for i in range(6)] == [False, True] * 3
    assert GPTConfig(1920, n_layer=2, window_pattern="s").windows == [512, None]
    assert GPTConfig(128, n_layer=2, window_pattern="S").windows == [None, None]


def test_flops_count_windows_and_no_lookups():
    with torch.device("meta"):
        plain = GPT(GPTConfig.from_depth(6, 1000, 2048))
        windowed = GPT(GPTConfig.from_depth(6, 1000, 2048, window_pattern="SSSL"))
        tables = GPT(GPTConfig.from_depth(6, 1000, 2048, value_embeddings=True, recall=5000))
    assert plain.estimate_flops() - windowed.estimate_flops() == 12 * 384 * 4 * (2048 - 512)
    assert tables.estimate_flops() - plain.estimate_flops() == 6 * 3 * 12 * 3  # the gates


@torch.no_grad()
def test_a_fresh_modern_model_starts_as_nanochats():
    torch.manual_seed(0)
    model = GPT(GPTConfig.from_depth(4, 2000, 64, **NANOCHAT_2026))
    model.init_weights()
    std = {name: float(p.std()) for name, p in model.named_parameters() if p.dim() == 2}
    assert std["transformer.wte.weight"] == pytest.approx(0.8, rel=0.02)
    assert std["lm_head.weight"] == pytest.approx(0.001, rel=0.02)
    assert std["transformer.h.0.attn.c_q.weight"] == pytest.approx(1 / 16, rel=0.02)
    assert std["transformer.h.0.mlp.c_fc.weight"] == pytest.approx(0.4 / 16, rel=0.02)
    assert std["value_embeds.1.weight"] == pytest.approx(1 / 16, rel=0.02)
    assert std["transformer.h.2.mlp.c_proj.weight"] == 0
    assert model.resid_lambdas.tolist() == pytest.approx([1.15, 1.15 - 0.1 / 3, 1.15 - 0.2 / 3, 1.05])
    assert model.x0_lambdas.tolist() == pytest.approx([0.2, 0.15, 0.1, 0.05])
    assert model.smear_lambda.item() == 0
    assert model.backout_lambda.item() == pytest.approx(0.2)


def test_configs_of_old_checkpoints_and_of_nanochat_load():
    old = {"sequence_len": 64, "vocab_size": 90, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 64}
    assert GPTConfig.from_dict(old) == GPTConfig(**old)
    modern = switched(NANOCHAT_2026, n_layer=2)
    assert GPTConfig.from_dict(old).logit_softcap == 15.0
    config = GPTConfig.from_nanochat(modern.config.to_dict() | {"window_pattern": "SSSL"}, modern.state_dict().keys())
    assert config.smear
    assert config.qk_scale == 1.2
    assert config.window_pattern == "SSSL"
    assert GPTConfig.from_nanochat(old, switched({}).state_dict().keys()) == GPTConfig(**old)
    with pytest.raises(ValueError, match="resid_lambdas"):
        GPTConfig.from_nanochat(old, ["resid_lambdas", "x0_lambdas"])


def test_a_checkpoint_of_before_a_switch_holds_the_same_model(tmp_path):
    """Else no run from before could be resumed."""
    model = switched({"smear": True})
    config = model.config.to_dict()
    del config["logit_softcap"], config["residual_factors"]
    load_weights(model, Checkpoint(tmp_path, {"model_config": config}, model.state_dict(), {}))
    free = switched({"smear": True, "logit_softcap": None})
    with pytest.raises(ValueError, match=r"logit_softcap 15\.0 -> None"):
        load_weights(free, Checkpoint(tmp_path, {"model_config": config}, model.state_dict(), {}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window_pattern": "SX"}, "window_pattern"),
        ({"window_pattern": ""}, "window_pattern"),
        ({"qk_scale": 0.0}, "qk_scale"),
        ({"init": "lucky"}, "init"),
        ({"smear": True, "n_embd": 16, "n_head": 2, "n_kv_head": 2}, "smear"),
        ({"recall": -1}, "recall"),
        ({"recall": 1}, "recall not 1"),
        ({"reach": -1}, "reach"),
        ({"residual_factors": True, "residual_scalars": True}, "residual_factors"),
        ({"key_offset": True, "n_embd": 12, "n_head": 2, "n_kv_head": 2}, "key_offset"),
    ],
)
def test_impossible_switches_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**values)
