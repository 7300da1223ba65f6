"""Interception: what it does not change, threads, and models that had a cache before."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading

import pytest
import torch
from artifact_factory import RECIPES, artifact_for
from custom_attention import ALL_ATTENTION_FUNCTIONS as OWN_FUNCTIONS
from custom_attention import custom_model
from models_zoo import tiny_model, token_ids
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM

from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.model.backward import recomputed_layers
from kvq_calib.model.capture import capture, intercept
from kvq_calib.model.compat import attention_entries, with_cache
from kvq_calib.model.intercept import attention_modules, carried, intercept_calls, mark
from kvq_calib.runtime import KVQCache, attach, attached, detach
from kvq_calib.runtime.attention import is_attached

pytestmark = pytest.mark.model
IDS = token_ids(1, 50)


@pytest.fixture
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def artifact():
    return artifact_for(tiny_model("llama"), RECIPES["nuq4-1p"])


def decode(call, cache, ids=IDS):
    """Logits through a cache: most tokens at once, some, then one."""
    with torch.no_grad():
        parts = torch.split(ids, [ids.shape[1] - 5, 4, 1], dim=1)
        return torch.cat([call(part, **with_cache(cache)).logits for part in parts], dim=1)


def plain(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def close(got, want):
    """Equal up to what matrix products of other sizes, or at other addresses, round differently."""
    return got.shape == want.shape and float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())


def in_thread(function):
    """Run in a thread of its own; return or raise what it does."""
    result = []

    def run():
        try:
            result.append((function(), None))
        except BaseException as error:
            result.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    ((value, error),) = result
    if error is not None:
        raise error
    return value


def entries_of(model):
    """Everything where the model's attention functions are looked up."""
    gc.collect()  # models of other tests may have been attached
    found = attention_entries(attention_modules(model)[0])
    return {(id(namespace), name): namespace[name] for namespace, name in found}


class TestWhatIsLeftAlone:
    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_configuration_and_functions(self, implementation, artifact):
        model = tiny_model("llama")
        model.set_attn_implementation(implementation)
        before, functions = copy.deepcopy(model.config.__dict__), entries_of(model)
        cache = KVQCache(artifact, model)
        decode(model, cache)
        assert model.config.__dict__ == before
        assert entries_of(model) != functions
        detach(model)
        assert entries_of(model) == functions
        assert not any(module._forward_pre_hooks for module in model.modules())

    def test_nothing_stays_when_an_attached_model_goes(self, artifact):
        witness = tiny_model("llama")
        before = entries_of(witness)
        model = tiny_model("llama")
        KVQCache(artifact, model)
        del model
        assert entries_of(witness) == before

    def test_the_last_to_leave_takes_the_wrappers_away(self, llama):
        other, before = tiny_model("llama", seed=1), entries_of(llama)
        attach(llama)
        with intercept_calls(other, lambda call: None):
            detach(llama)
            assert entries_of(llama) != before
        assert entries_of(llama) == before

    def test_functions_that_others_register_meanwhile_stay(self, llama):
        def theirs(module, query, key, value, *args, **kwargs):
            raise AssertionError("not called")

        attach(llama)
        AttentionInterface.register("kvq_test", theirs)
        try:
            detach(llama)
            assert AttentionInterface()["kvq_test"] is theirs
        finally:
            AttentionInterface._global_mapping.pop("kvq_test")

    def test_models_that_are_not_held_call_their_function_at_once(self, llama):
        other = tiny_model("llama", seed=1)
        want = plain(other)
        seen = []
        with intercept_calls(llama, seen.append):
            assert torch.equal(plain(other), want)
        assert seen == []

    def test_another_model_compiles_as_one_graph(self, llama):
        other = tiny_model("llama", seed=1)
        want = plain(other)
        attach(llama)
        assert torch.equal(plain(torch.compile(other, backend="eager", fullgraph=True)), want)


class TestWhereFunctionsAreFound:
    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_a_family_of_its_own(self, implementation):
        model = custom_model(implementation=implementation)
        seen = []
        with intercept_calls(model, lambda call: seen.append(call.layer)):
            plain(model)
        assert seen == [0, 1]

    def test_a_family_that_overrides_an_implementation(self, monkeypatch):
        model, calls = custom_model(), []

        def own(module, query, key, value, *args, **kwargs):
            calls.append(module.layer_idx)
            return AttentionInterface()["sdpa"](module, query, key, value, *args, **kwargs)

        want = plain(model)
        monkeypatch.setitem(OWN_FUNCTIONS._local_mapping, "sdpa", own)
        seen = []
        with intercept_calls(model, lambda call: seen.append(call.layer)):
            got = plain(model)
        # The family's function looks up the one it overrides; each call is seen once.
        assert seen == calls == [0, 1]
        assert torch.equal(got, want)
        assert OWN_FUNCTIONS._local_mapping["sdpa"] is own


class TestThreads:
    def test_a_handler_sees_calls_of_its_own_thread_only(self, llama):
        seen = []
        want = plain(llama)
        with intercept(llama, lambda kv: (kv.keys, torch.zeros_like(kv.values))):
            assert torch.equal(in_thread(lambda: plain(llama)), want)
            assert not torch.equal(plain(llama), want)
            with intercept_calls(llama, lambda call: seen.append(threading.get_ident())):
                in_thread(lambda: plain(llama))
                plain(llama)
        assert seen == [threading.get_ident()] * 2

    def test_two_threads_with_a_cache_each_write_the_same_text_as_alone(self, llama, artifact):
        prompts = [token_ids(1, 8, seed=1), token_ids(1, 20, seed=2)]

        def write(prompt):
            cache = KVQCache(artifact, llama)
            return llama.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=30,
                do_sample=False,
                **with_cache(cache),
            )

        alone = [write(prompt) for prompt in prompts]
        start, found = threading.Barrier(4), {}

        def run(number):
            start.wait()
            try:
                found[number] = write(prompts[number % 2])
            except Exception as error:
                found[number] = error

        for _ in range(3):
            threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for number in range(4):
                assert torch.equal(found[number], alone[number % 2]), found[number]

    def test_a_model_serves_a_cache_while_another_thread_intercepts_it(self, llama, artifact):
        cache = KVQCache(artifact, llama)
        want = decode(llama, KVQCache(artifact, llama))
        with intercept(llama, lambda kv: (kv.keys, torch.zeros_like(kv.values))):
            assert torch.equal(in_thread(lambda: decode(llama, cache)), want)

    def test_layers_recomputed_by_another_thread_find_their_handler(self, llama):
        """As on a GPU, where a backward pass runs in threads of autograd."""

        def gradients(backward):
            found = {}
            leaf = llama.get_input_embeddings().register_forward_hook(
                lambda module, args, output: output.detach().requires_grad_()
            )
            watched = capture(llama, None, lambda kv, *g: found.update({kv.layer: g}), recompute=True)
            with watched, recomputed_layers(llama):
                loss = llama(IDS, use_cache=False).logits.log_softmax(-1)[..., 0].mean()
                backward(loss.backward)
            leaf.remove()
            return found

        want, got = gradients(lambda run: run()), gradients(in_thread)
        assert list(want) == list(got) == [1, 0]
        for layer, pair in want.items():
            assert all(torch.equal(a, b) for a, b in zip(pair, got[layer], strict=True))

    def test_what_is_carried_replaces_the_handlers_of_the_thread(self, llama):
        seen = []
        with intercept_calls(llama, lambda call: seen.append("first")):
            run = carried(lambda: plain(llama))
        with intercept_calls(llama, lambda call: seen.append("second")):
            in_thread(run)
            run()
            plain(llama)
        assert seen == ["first"] * 4 + ["second"] * 2


class TestWithoutNoGrad:
    @pytest.mark.parametrize("recipe", ["nuq4-1p", "nuq3-exact", "dense2"])
    def test_what_is_stored_is_detached(self, recipe):
        model = tiny_model("llama").requires_grad_(True)
        artifact = artifact_for(model, RECIPES[recipe])
        want = decode(model, KVQCache(artifact, model))
        cache = KVQCache(artifact, model)
        got = [model(part, **with_cache(cache)).logits for part in torch.split(IDS, [45, 4, 1], dim=1)]
        assert torch.equal(torch.cat(got, 1), want)
        stored = [t for layer in cache.layers for t in vars(layer.storage).values() if torch.is_tensor(t)]
        assert len(stored) >= 4
        assert not any(tensor.requires_grad for tensor in stored)

    def test_a_backward_pass_is_refused_and_not_wrong(self, llama, artifact):
        llama.requires_grad_(True)
        logits = llama(IDS, **with_cache(KVQCache(artifact, llama))).logits
        with pytest.raises(RuntimeMismatchError, match="a packed cache has no gradients"):
            logits.sum().backward()


class Wrapper(nn.Module):
    """As adapters wrap a model: another module object around it."""

    def __init__(self, model):
        super().__init__()
        self.base_model, self.config = model, model.config

    @property
    def device(self):
        return self.base_model.device

    def forward(self, input_ids, **kwargs):
        return self.base_model(input_ids=input_ids, **kwargs)


class TestModelsThatHadACacheOnce:
    @pytest.fixture
    def used(self, llama, artifact):
        KVQCache(artifact, llama)
        return llama

    @pytest.fixture
    def want(self, artifact):
        model = tiny_model("llama")
        return decode(model, KVQCache(artifact, model))

    def test_copies(self, used, artifact, want):
        made = copy.deepcopy(used)
        assert not is_attached(made)
        assert torch.equal(decode(made, KVQCache(artifact, made)), want)
        detach(used)
        assert is_attached(made)
        assert torch.equal(decode(made, KVQCache(artifact, made)), want)

    def test_models_made_from_its_configuration(self, used, artifact, want, tmp_path):
        used.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, config=used.config).eval()
        assert close(decode(loaded, KVQCache(artifact, loaded)), want)
        fresh = AutoModelForCausalLM.from_config(used.config).eval()
        fresh.load_state_dict(used.state_dict())
        assert close(decode(fresh, KVQCache(artifact, fresh)), want)

    def test_wrappers(self, used, artifact, want):
        wrapped = Wrapper(used)
        assert torch.equal(decode(wrapped, KVQCache(artifact, wrapped)), want)
        detach(wrapped)
        assert not is_attached(used)

    def test_compiled(self, used, artifact, want):
        compiled = torch.compile(used, backend="eager")
        fresh = torch.compile(tiny_model("llama"), backend="eager")
        got = decode(compiled, KVQCache(artifact, compiled))
        assert torch.equal(got, decode(fresh, KVQCache(artifact, fresh)))
        assert close(got, want)  # compiled, older versions round otherwise
        detach(fresh)
        assert torch.equal(plain(compiled), plain(torch.compile(tiny_model("llama"), backend="eager")))

    def test_the_model_inside(self, used, artifact, want):
        cache = KVQCache(artifact, used.model)
        with torch.no_grad():
            hidden = [
                used.model(part, **with_cache(cache)).last_hidden_state
                for part in torch.split(IDS, [45, 4, 1], dim=1)
            ]
            assert close(used.lm_head(torch.cat(hidden, 1)), want)

    @pytest.mark.parametrize(("first", "second"), [("sdpa", "eager"), ("eager", "sdpa")])
    def test_another_implementation(self, artifact, want, first, second):
        model = tiny_model("llama")
        model.set_attn_implementation(first)
        cache = KVQCache(artifact, model)
        model.set_attn_implementation(second)
        assert model.config._attn_implementation == second
        for each in (cache, KVQCache(artifact, model)):
            assert close(decode(model, each), want)
        reference = tiny_model("llama")
        reference.set_attn_implementation(second)
        assert torch.equal(plain(model), plain(reference))

    def test_an_implementation_whose_masks_cannot_be_read(self, used, artifact):
        cache = KVQCache(artifact, used)
        used.set_attn_implementation("flex_attention")
        with pytest.raises(RuntimeMismatchError, match=r"'flex_attention'.*set_attn_implementation"):
            KVQCache(artifact, used)
        with contextlib.suppress(Exception):  # whatever makes the mask may not run here
            decode(used, cache)
        assert cache.get_seq_length() == 0
        used.set_attn_implementation("sdpa")
        decode(used, KVQCache(artifact, used))

    def test_attached_for_a_while(self, llama):
        with attached(llama):
            with attached(llama.model):
                assert is_attached(llama)
            assert is_attached(llama)
        assert not is_attached(llama)
        assert not is_attached(nn.Linear(1, 1))


def test_attention_of_a_cache_layer_is_contiguous(llama):
    class Layer:
        def attend(self, call):
            assert not torch.is_grad_enabled()
            return call.query.transpose(1, 2)

    attach(llama)
    module = llama.model.layers[0].self_attn
    query = torch.randn(2, 4, 3, 16)
    key, value = torch.randn(2, 2, 3, 16), torch.randn(2, 2, 3, 16)
    result, weights = AttentionInterface()["sdpa"](module, query, mark(key, Layer()), value, None)
    assert result.is_contiguous()
    assert torch.equal(result, query.transpose(1, 2))
    assert weights is None


def test_masks_that_are_no_tensors_are_refused(llama, artifact):
    cache = KVQCache(artifact, llama)
    module = llama.model.layers[0].self_attn
    key, value = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16)
    marked, value = cache.update(key, value, 0)
    with pytest.raises(RuntimeMismatchError, match="masks of the type object cannot be read"):
        AttentionInterface()["sdpa"](module, torch.randn(1, 4, 3, 16), marked, value, object())
    assert cache.get_seq_length() == 0
