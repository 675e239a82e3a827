"""The tree of a pack's texts: each token once, wherever texts fork; log-probs and gradients against one text at a time."""

import itertools
import random

import pytest
import torch
from test_logprobs import FAMILIES, tiny_family

from repro.core import logprobs, tree
from repro.core.tree import Scored, common_prefix, pack, packed_tokens, whole_tokens


def texts_of(seed: int, kinds: int = 3, most: int = 12, count: int = 14) -> list[Scored]:
    """Texts over few tokens: they fork anywhere, some are equal, some are the beginning of another."""
    draw = random.Random(seed)
    ids = [[draw.randrange(1, 1 + kinds) for _ in range(draw.randint(2, most))] for _ in range(count)]
    return [Scored(text, draw.randint(1, len(text) - 1)) for text in ids]


CASES = {f"drawn {seed}": texts_of(seed, kinds) for seed, kinds in itertools.product(range(4), (1, 2, 3))} | {
    "nothing shared": [Scored([k, 9, 8 + k], 1) for k in range(1, 6)],
    "all shared": [Scored([1, 2, 3, 4], 2)] * 5,
    "another place where scoring starts": [Scored([1, 2, 3, 4], 1), Scored([1, 2, 3, 4], 3), Scored([1, 2, 3], 2)],
    "the same text, and more": [Scored([1, 2], 1), Scored([1, 2, 3], 1), Scored([1, 2, 3, 4], 1), Scored([1, 2, 5], 2)],
    "the longest first": [Scored([1, 2, 3, 4], 1), Scored([1, 2], 1), Scored([1, 2, 3, 5], 3)]}


@pytest.mark.parametrize("pairs", CASES.values(), ids=CASES)
def test_each_beginning_is_one_token_and_sees_its_own(pairs):
    """By another way of counting: the set of all beginnings of all texts."""
    packed = pack(pairs)
    beginnings = {tuple(p.ids[:k]) for p in pairs for k in range(1, len(p.ids) + 1)}
    sees = packed.layout.mask()
    seen = [tuple(packed.ids[sees[t]].tolist()) for t in range(len(packed.ids))]  # a text's tokens stand in their order
    assert set(seen) == beginnings and len(seen) == len(beginnings) == packed.layout.tokens == packed_tokens([pairs])
    assert packed.positions.tolist() == [len(path) - 1 for path in seen]
    assert all(tokens > 0 for tokens, _, _ in packed.layout.branches)
    offsets = packed.offsets.tolist()
    for pair, a, b in zip(pairs, offsets, offsets[1:]):
        assert [seen[t] for t in packed.source[a:b].tolist()] == [tuple(pair.ids[:k]) for k in range(pair.start, len(pair.ids))]
        assert packed.target[a:b].tolist() == pair.ids[pair.start:]
    assert whole_tokens([pairs]) == sum(len(p.ids) for p in pairs) >= packed_tokens([pairs])


@pytest.mark.parametrize("kind", [list, tuple])
def test_common_prefix_is_where_the_first_of_them_differs(kind):
    draw = random.Random(0)
    for _ in range(2000):
        begin = [draw.randrange(2) for _ in range(draw.randrange(9))]
        texts = [begin[:draw.randrange(len(begin) + 1)] + [draw.randrange(2) for _ in range(draw.randrange(4))]
                 for _ in range(draw.randrange(1, 5))]
        same = 0
        while all(len(text) > same for text in texts) and len({text[same] for text in texts}) == 1:
            same += 1
        assert common_prefix(list(map(kind, texts))) == same


def test_the_first_text_stands_whole_and_others_near_to_where_they_leave_it():
    """By hand: a query's prompts "1 2 3" and "1 2 4" with responses "7 8", "7 9", and one under another header."""
    packed = pack([Scored([1, 2, 3, 7, 8], 3), Scored([1, 2, 3, 7, 9], 3), Scored([1, 2, 4, 7, 8], 3), Scored([1, 2, 4, 7, 9], 3),
                   Scored([5, 6], 1)])
    assert packed.ids.tolist() == [1, 2, 3, 7, 8, 9, 4, 7, 8, 9, 5, 6]
    assert packed.layout.branches == ((5, -1, 0), (1, 0, 4), (3, 0, 2), (1, 2, 2), (2, -1, 0))
    assert packed.source.tolist() == [2, 3, 2, 3, 6, 7, 6, 7, 10]  # the response's first token: scored once for each text


def test_two_levels_are_laid_out_as_they_were():
    """[prefix | tail 1 | ... | tail R], group after group."""
    groups = [([1, 2, 3], [[4, 5], [6], [7, 8, 9]]), ([2, 2], [[1], [3, 3], [4]])]
    packed = pack([Scored(prefix + tail, len(prefix)) for prefix, tails in groups for tail in tails])
    assert packed.ids.tolist() == [token for prefix, tails in groups for token in prefix + sum(tails, [])]
    assert packed.layout.branches == ((5, -1, 0), (1, 0, 3), (3, 0, 3), (3, -1, 0), (2, 3, 2), (1, 3, 2))


@pytest.mark.parametrize("count", [40, 3000])
def test_texts_that_fork_at_every_token(count):
    """No recursion, and no more work than the texts are long."""
    texts = [[1] * k + [2] for k in range(1, count, max(1, count // 60))]
    packed = pack([Scored(text, 1) for text in texts])
    assert packed.layout.tokens == len({tuple(t[:k]) for t in texts for k in range(1, len(t) + 1)})


# ---- the matrix


def queries(vocabulary: int, shape: str, seed: int = 0) -> list[tree.Pairs]:
    """3 queries of 2 x 3 pairs: header, query, constitution, response; of a depth of four and more."""
    draw = random.Random(seed)

    def some(n):
        return [draw.randrange(5, vocabulary) for _ in range(n)]

    header, found = some(4), []
    for _ in range(3):
        query, begin = some(draw.randint(2, 5)), some(2)
        prompts = [header + query + some(draw.randint(1, 4)) for _ in range(2)]
        responses = [begin + some(3), begin + some(1), some(2)]
        if shape == "nothing shared":
            found.append([[Scored(some(n) + some(3), n) for n in (3, 5, 4)] for _ in prompts])
        elif shape == "all shared":
            found.append([[Scored(prompts[0] + responses[0], len(prompts[0]))] * 3] * 2)
        else:
            found.append([[Scored(p + r, len(p)) for r in responses] for p in prompts])
    return found


@pytest.mark.parametrize("shape", ["forks everywhere", "nothing shared", "all shared"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_every_family_are_those_of_one_text_at_a_time(family, shape):
    """In float64, but for the norms and routers that families round to float32; random upstream weights."""
    model = tiny_family(family).double()
    way, parts = logprobs.settled(model, "shared"), queries(259, shape)
    weights = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def outcome(way):
        model.zero_grad()
        found = logprobs.matrix_of(way, model, parts, length_normalize=True)
        (found * weights).sum().backward()
        return found.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    (ours, own), (truth, theirs) = outcome(way), outcome("reference")
    assert (ours - truth).abs().max() <= 1e-6 * truth.abs().max()
    for name, grad in theirs.items():
        assert (own[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-12, name


# ---- what is easily got wrong about trees, beside the above (tests/test_attention.py: masks, windows, copies; test_logprobs.py:
# texts that are alike and not as ids, dropout, recurrent layers, the replay of a checkpointed layer; test_plan.py: bytes)


def test_copies_of_keys_are_one_path_a_branch_and_never_more_than_texts_in_full():
    """8 x 8, the most there is to copy: each of 64 branches ends a text and has that text's path. The copies live for one
    layer's attention."""
    header, constitutions, responses = [1] * 20, [[2, k] * 4 for k in range(8)], [[3, k, k, 7] for k in range(8)]
    pairs = [Scored(header + c + r, 28) for c in constitutions for r in responses]
    packed = pack(pairs)
    copied = packed.layout.varlen(torch.device("cpu")).gather
    assert packed.layout.tokens == 20 + 1 + 8 * 7 + 8 * 1 + 64 * 3 and len(packed.layout.branches) == 64
    assert len(copied) == 32 + 7 * (21 + 11) + 8 * 7 * (29 + 3) == whole_tokens([pairs])


def test_a_router_that_looks_at_the_whole_pack_is_found():
    """A statistic over a packed row (balanced experts, say) is none of a text's own; routers that look at their own token
    alone, as mixtral's, are right (above)."""
    from repro.core import probe

    model = tiny_family("mixtral").double()
    assert logprobs.settled(model, "shared") in logprobs.WAYS[:2]
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_pre_hook(lambda _, inputs: (inputs[0] - inputs[0].mean(0), *inputs[1:]))
    found = probe.of_model(model, logprobs.score)
    assert found.way != "shared" and ("have other log-probs than each alone" in found.refusal or "not a causal" in found.refusal)


def test_sharing_ends_where_a_pass_and_a_rank_end():
    """What a pass computes is its own tree, and that is what its bytes are counted for; the parts take more than the whole."""
    from repro.core.engines import deal
    from repro.core.loop import OneProcess

    parts = [[[Scored([9, 9, 9, *pair.ids], 3 + pair.start) for pair in group] for group in pairs]
             for seed in (0, 1) for pairs in queries(259, "forks everywhere", seed)]
    lengths = [packed_tokens(pairs) for pairs in parts]
    model, computed = tiny_family("llama"), []
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: computed.append(inputs[0].numel()))
    logprobs.settled(model, "shared")
    for ranks in (1, 2):
        passes = deal(lengths, ranks, max(lengths) * 2) if ranks > 1 else [OneProcess().passes(lengths, max(lengths) * 2)]
        for chosen, counted in itertools.chain(*passes):
            computed.clear()
            logprobs.matrix_of("shared", model, [parts[q] for q in chosen], length_normalize=True)
            assert computed == [packed_tokens(*(parts[q] for q in chosen))] and counted in (0, len(chosen))
    assert packed_tokens(*parts[:3]) + packed_tokens(*parts[3:]) > packed_tokens(*parts)


def test_few_tokens_may_be_scored_often_and_both_are_counted():
    """The tree's tokens bound a pass, the scored ones the head's part of its bytes."""
    from repro.core.memory import Step, training_bytes
    from repro.core.shapes import counted

    shape = counted(tiny_family("llama"))
    few, many = (training_bytes(shape, Step(ranks=1, precision="bf16", optimizer="adamw", pack_tokens=1000, scored=scored,
                                            longest=1000))["head"] for scored in (100, 10_000))
    assert sum(many.values()) > sum(few.values()) and many["activations"] > few["activations"]


def test_parts_are_cut_by_the_order_alone_as_few_and_as_even_as_can_be():
    """A number's last bits depend on what is computed beside it: which queries that are must be the same in a run that was
    interrupted. By trying every cut."""
    for seed in range(40):
        draw = random.Random(seed)
        lengths, budget = [draw.randint(1, 9) for _ in range(draw.randint(1, 8))], draw.randint(6, 20)
        cuts = [c for n in range(len(lengths)) for c in itertools.combinations(range(1, len(lengths)), n)]
        parted = [[lengths[a:b] for a, b in zip((0, *cut), (*cut, len(lengths)))] for cut in cuts]
        allowed = [parts for parts in parted if all(sum(part) <= budget or len(part) == 1 for part in parts)]
        fewest = [parts for parts in allowed if len(parts) == min(map(len, allowed))]
        found = [lengths[cut] for cut in logprobs.slices(lengths, budget)]
        assert sum(found, []) == lengths and len(found) == len(fewest[0])
        assert max(map(sum, found)) == min(max(map(sum, parts)) for parts in fewest)


def test_a_query_with_more_tokens_than_a_pass_stays_whole_up_to_a_limit(monkeypatch):
    """Its constitutions share more than the cache is worth; beyond the limit as many of them as fit stand together."""
    rng, seen, model = random.Random(3), [], tiny_family("llama").double()
    model.get_input_embeddings().register_forward_hook(lambda _, given, __: seen.append(given[0].numel()))
    logprobs.settled(model, "shared")

    def ids(n):
        return [rng.randrange(3, 259) for _ in range(n)]

    query, replies = ids(60), [ids(9) for _ in range(6)]
    pairs = [[Scored(query + own + reply, 60 + len(own)) for reply in replies] for own in (ids(7) for _ in range(6))]
    with torch.no_grad():
        truth = logprobs.matrix_of("reference", model, [pairs], length_normalize=False)
        seen.clear()
        whole = logprobs.matrix_of("shared", model, [pairs], length_normalize=False, budget=40)
        assert seen == [packed_tokens(pairs)] and seen[0] < 60 + 6 * (7 + 6 * 9) + 1
        seen.clear()
        monkeypatch.setattr(logprobs, "QUERY_TOKENS", 250)  # one constitution and its responses take 121
        parts = logprobs.matrix_of("shared", model, [pairs], length_normalize=False, budget=40)
        assert seen == [packed_tokens(pairs[k: k + 2]) for k in (0, 2, 4)]
    torch.testing.assert_close(whole, truth, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(parts, truth, rtol=1e-9, atol=1e-9)


def test_the_same_packs_give_the_same_bits_whatever_came_before():
    """Of 12 queries by position, as a stage hands them over: again, and after other packs."""
    model = tiny_family("llama")
    first, other = (queries(259, "forks everywhere", seed) + queries(259, "nothing shared", seed) for seed in (0, 5))
    logprobs.settled(model, "shared")

    def bits(parts):
        with torch.no_grad():
            return logprobs.matrix_of("shared", model, parts, length_normalize=False, budget=40).numpy().tobytes()

    before = bits(first)
    bits(other)
    assert bits(first) == before and bits(first[:3]) == before[: len(before) // 2]
