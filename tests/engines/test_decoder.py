"""The decode thread on its own: joining, chunks, rows, reuse, updates, failures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from engine_lab import LocalDecoder, greedy_reference, make_model, prompt_of, request_of

from areal_sub.engines.embedded.weights import WeightNames, WeightUpdate, read_update
from areal_sub.errors import OutOfMemory

Decoders = Callable[..., LocalDecoder]


def full_logits(model: torch.nn.Module, prompt: list[int], sampled: list[int]) -> torch.Tensor:
    """Logits [sampled, vocab] that each token was sampled from, by one plain pass over all."""
    logits = model(input_ids=torch.tensor([prompt + sampled])).logits[0]
    return logits[len(prompt) - 1 : -1].float()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_a_full_pass(decoders: Decoders, temperature: float) -> None:
    model = make_model("llama")
    decoder = decoders(model, max_prefill_tokens=16)
    prompts = [prompt_of(n) for n in (5, 40, 23, 70)]
    ids = [decoder.send(request_of(p, temperature=temperature, max_new_tokens=30)) for p in prompts]
    for request_id, prompt in zip(ids, prompts, strict=True):
        done = decoder.wait(request_id)
        want = torch.log_softmax(full_logits(model, prompt, list(done.token_ids)) / temperature, -1)
        want = want.gather(1, torch.tensor(done.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(done.logprobs), want, atol=1e-4, rtol=0)


def test_top_p_logprobs_are_renormalised(decoders: Decoders) -> None:
    model = make_model("llama")
    decoder = decoders(model)
    prompt = prompt_of(30)
    plain = decoder.send(request_of(prompt, temperature=1.0, max_new_tokens=30))
    cut = decoder.send(request_of(prompt, temperature=1.0, top_p=0.5, max_new_tokens=30))
    decoder.wait(plain)
    done = decoder.wait(cut)
    probs = full_logits(model, prompt, list(done.token_ids)).softmax(-1)
    for row, token_id, logprob in zip(probs, done.token_ids, done.logprobs, strict=True):
        ordered, order = row.sort(descending=True)
        num_kept = int((ordered.cumsum(0) < 0.5).sum()) + 1
        kept = order[:num_kept].tolist()
        assert token_id in kept
        want = (row[token_id] / ordered[:num_kept].sum()).log().item()
        assert logprob == pytest.approx(want, abs=1e-4)


def test_more_requests_than_rows_all_finish_with_their_own_tokens(decoders: Decoders) -> None:
    model = make_model("llama")
    decoder = decoders(model, max_running_requests=3, max_prefill_tokens=40)
    prompts = [prompt_of(3 + 5 * i % 60, salt=i) for i in range(20)]
    ids = [decoder.send(request_of(p, max_new_tokens=3 + i % 7)) for i, p in enumerate(prompts)]
    for i, (request_id, prompt) in enumerate(zip(ids, prompts, strict=True)):
        assert decoder.wait(request_id).token_ids == greedy_reference(model, prompt, 3 + i % 7)
    assert (decoder.num_running, decoder.num_waiting) == (0, 0)


def test_many_requests_of_one_rollout_let_those_of_others_pass(decoders: Decoders) -> None:
    decoder = decoders(make_model("llama"), max_running_requests=1)
    decoder.pause().result(10)
    whose = ["many", "many", "many", "other"]
    ids = [decoder.send(request_of(prompt_of(5), affinity=each)) for each in whose]
    decoder.resume().result(10)
    for request_id in ids:
        decoder.wait(request_id)
    assert list(decoder.results) == [ids[0], ids[3], ids[1], ids[2]]


def test_a_long_prompt_is_computed_in_pieces_while_others_decode(decoders: Decoders) -> None:
    model = make_model("llama")
    decoder = decoders(model, max_prefill_tokens=8)
    num_meanwhile = []

    def join() -> None:
        decoder.send(
            request_of(prompt_of(120, salt=2), max_new_tokens=5),
            at=5,
            act=lambda: num_meanwhile.append(len(decoder.results[0])),
        )

    decoder.send(request_of(prompt_of(5), max_new_tokens=100, stream=True), at=5, act=join)
    assert decoder.wait(0).token_ids == greedy_reference(model, prompt_of(5), 100)
    assert decoder.wait(1).token_ids == greedy_reference(model, prompt_of(120, salt=2), 5)
    # 15 pieces, the last of which gave the first of 5 tokens; one for each of these steps.
    assert num_meanwhile == [5 + 15 + 4]


def test_a_request_that_might_not_fit_in_memory_waits(decoders: Decoders) -> None:
    model = make_model("llama")
    decoder = decoders(model, max_kv_tokens=160)
    decoder.pause().result(10)
    ids = [decoder.send(request_of(prompt_of(60, salt=i), max_new_tokens=20)) for i in range(3)]
    most = 0
    admit = decoder._admit

    def watched() -> list[int]:
        nonlocal most
        chunks = admit()
        most = max(most, decoder.num_running)
        return chunks

    decoder._admit = watched  # type: ignore[method-assign]
    decoder.resume().result(10)
    for i, request_id in enumerate(ids):
        assert decoder.wait(request_id).token_ids == greedy_reference(model, prompt_of(60, i), 20)
    assert most == 2


def test_memory_follows_need(decoders: Decoders) -> None:
    decoder = decoders(make_model("llama"))
    cache = decoder._runner.cache
    assert (cache.num_rows, cache.length) == (4, 64)
    decoder.wait(decoder.send(request_of(prompt_of(140))))
    assert cache.length >= 140
    decoder.wait(decoder.send(request_of(prompt_of(5), max_new_tokens=2)))
    assert cache.length == 64


def test_the_next_turn_reuses_the_last_ones_keys_and_values(decoders: Decoders) -> None:
    model = make_model("llama")
    decoder = decoders(model)
    prompt = prompt_of(40)
    reused = []
    for _ in range(3):
        done = decoder.wait(decoder.send(request_of(prompt, affinity="r1")))
        assert done.token_ids == greedy_reference(model, prompt, 10)
        logprobs = torch.log_softmax(full_logits(model, prompt, list(done.token_ids)), -1)
        torch.testing.assert_close(
            torch.tensor(done.logprobs), logprobs.amax(-1), atol=1e-4, rtol=0
        )
        reused.append(decoder.num_reused_tokens)
        prompt = [*prompt, *done.token_ids, *prompt_of(9, salt=5)]
    # All but the last sampled token, whose keys and values nothing has needed yet.
    assert reused == [0, 49, 49 + 68]
    decoder.wait(decoder.send(request_of(prompt, affinity="r2")))
    assert decoder.num_reused_tokens == reused[-1], "another rollout's prefix is not used"


def weights_of(model: transformers.PreTrainedModel, path: Path) -> WeightUpdate:
    return read_update(path, WeightNames.of(model))


def test_stale_keys_and_values_never_serve_a_new_request(
    decoders: Decoders, new_weights: Path
) -> None:
    model = make_model("llama")
    decoder = decoders(model)
    update = weights_of(model, new_weights)
    prompt = prompt_of(40)
    decoder.wait(decoder.send(request_of(prompt, affinity="r")))
    across = decoder.send(
        request_of(prompt, affinity="across", max_new_tokens=20, stream=True),
        at=5,
        act=lambda: decoder.update(update, 1),
    )
    done = decoder.wait(across)
    assert set(done.versions) == {0, 1}
    reused = decoder.num_reused_tokens
    new = make_model("llama", seed=1)
    for affinity in ("r", "across"):
        longer = prompt + list(done.token_ids[:2])
        got = decoder.wait(decoder.send(request_of(longer, affinity=affinity)))
        assert got.token_ids == greedy_reference(new, longer, 10)
        assert set(got.versions) == {1}
    assert decoder.num_reused_tokens == reused


def test_an_update_in_mid_request_changes_the_tokens_after_it(
    decoders: Decoders, new_weights: Path
) -> None:
    old, new = make_model("llama"), make_model("llama", seed=1)
    decoder = decoders(make_model("llama"))
    prompt = prompt_of(20)
    update = weights_of(decoder._runner.model, new_weights)
    request_id = decoder.send(
        request_of(prompt, max_new_tokens=30, stream=True),
        at=7,
        act=lambda: decoder.update(update, 1),
    )
    done = decoder.wait(request_id)
    assert list(done.versions) == [0] * 7 + [1] * 23
    # The same by hand: the old model's keys and values stay, the new model goes on from them.
    cache = transformers.DynamicCache(config=old.config)
    ids, token_ids = prompt, []
    for i in range(30):
        model = old if i < 7 else new
        logits = model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True).logits
        token_ids.append(int(logits[0, -1].argmax()))
        ids = token_ids[-1:]
    assert done.token_ids == token_ids
    assert done.token_ids != greedy_reference(old, prompt, 30)


def test_an_abort_frees_the_row_and_leaves_the_others_alone(decoders: Decoders) -> None:
    model = make_model("llama")
    decoder = decoders(model, max_running_requests=3)

    def abort() -> None:
        decoder.abort(0)  # runs
        decoder.abort(3)  # waits

    def send(i: int, **hook: Any) -> int:
        return decoder.send(request_of(prompt_of(10, i), max_new_tokens=30, stream=True), **hook)

    assert [send(0, at=3, act=abort), *(send(i) for i in range(1, 5))] == [0, 1, 2, 3, 4]
    for i in (1, 2, 4):
        assert decoder.wait(i).token_ids == greedy_reference(model, prompt_of(10, i), 30)
    assert len(decoder.results[0]) == 3
    assert 3 not in decoder.results


def test_an_aborted_prompt_in_pieces_makes_room(decoders: Decoders) -> None:
    model = make_model("llama")
    decoder = decoders(model, max_prefill_tokens=2, max_running_requests=2)
    record = request_of(prompt_of(5), max_new_tokens=40, stream=True)
    running = decoder.send(record, at=10, act=lambda: decoder.abort(long))
    long = decoder.send(request_of(prompt_of(150)))
    after = decoder.send(request_of(prompt_of(8), max_new_tokens=20))
    assert decoder.wait(after).token_ids == greedy_reference(model, prompt_of(8), 20)
    assert decoder.wait(running).token_ids == greedy_reference(model, prompt_of(5), 40)
    assert long not in decoder.results


def test_weights_that_give_no_numbers_fail_requests_not_the_engine(
    decoders: Decoders, new_weights: Path
) -> None:
    model = make_model("llama")
    decoder = decoders(model)
    good = weights_of(model, new_weights)
    bad = WeightUpdate(
        {name: torch.full_like(t.load(), torch.nan) for name, t in good.tensors.items()}
    )
    record = request_of(prompt_of(20), max_new_tokens=140, stream=True)
    done = decoder.wait(decoder.send(record, at=3, act=lambda: decoder.update(bad, 1)))
    assert done.error == "the model's logits are not finite at policy version 1"
    assert "not finite" in decoder.wait(decoder.send(request_of(prompt_of(30)))).error
    decoder.update(good, 2).result(10)
    new = make_model("llama", seed=1)
    ids = [decoder.send(request_of(prompt_of(n))) for n in (4, 20)]
    assert decoder.wait(ids[0]).token_ids == greedy_reference(new, prompt_of(4), 10)
    assert decoder.wait(ids[1]).token_ids == greedy_reference(new, prompt_of(20), 10)


def test_an_aborted_prompt_leaves_nothing_that_is_not_a_number(
    decoders: Decoders, new_weights: Path
) -> None:
    model = make_model("llama")
    good = weights_of(model, new_weights)
    bad = WeightUpdate(
        {name: torch.full_like(t.load(), torch.nan) for name, t in good.tensors.items()}
    )
    decoder = decoders(model, max_prefill_tokens=8)
    decoder.update(bad, 1).result(10)
    num_admissions = 0
    admit = decoder._admit

    def abort_in_the_middle() -> list[int]:
        nonlocal num_admissions
        num_admissions += 1
        if num_admissions == 3:
            decoder.abort(long)
            decoder.update(good, 2)
        return admit()

    decoder._admit = abort_in_the_middle  # type: ignore[method-assign]
    long = decoder.send(request_of(prompt_of(60)))
    # It joins the row that the long one leaves, shorter than what was computed of that.
    after = decoder.send(request_of(prompt_of(4), max_new_tokens=30))
    done = decoder.wait(after)
    assert (done.error, list(done.versions)) == ("", [2] * 30)
    assert done.token_ids == greedy_reference(make_model("llama", seed=1), prompt_of(4), 30)
    assert long not in decoder.results


def test_out_of_memory_names_the_keys_to_lower(decoders: Decoders) -> None:
    decoder = decoders(make_model("llama"))

    def fail(*args: object) -> torch.Tensor:
        return torch.empty(2**60, dtype=torch.uint8)

    decoder._runner.forward = fail  # type: ignore[method-assign, assignment]
    decoder.send(request_of(prompt_of(3)))
    with pytest.raises(OutOfMemory, match=r"1 requests .* lower engine\.max_running_requests"):
        decoder.ended.result(10)


def test_an_error_in_a_step_ends_the_thread_and_says_why(decoders: Decoders) -> None:
    decoder = decoders(make_model("llama"))

    def fail(*args: object) -> None:
        raise RuntimeError("out of memory")

    decoder._runner.forward = fail  # type: ignore[method-assign, assignment]
    decoder.send(request_of(prompt_of(3)))
    with pytest.raises(RuntimeError, match="out of memory"):
        decoder.ended.result(10)
