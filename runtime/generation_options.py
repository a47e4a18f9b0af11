"""The options of ``model.generate`` that `Engine` takes, checked before anything runs."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.cache_utils import Cache

from ..predictors.checks import (
    check_above_zero,
    check_count,
    check_encodable,
    check_flag,
    check_seed,
    check_temperature,
    kind_of,
)
from ..predictors.errors import CoreskipError
from .unknown import closest

#: Options that an engine makes of the prompt.
_OF_THE_PROMPT = ("input_ids", "inputs", "inputs_embeds", "attention_mask")
#: And those that it has besides ``model.generate``.
_OF_ENGINES = ("seed", "stop_strings")


def own_options(model: Any, options: dict[str, Any]) -> tuple[int | None, list[str], dict[str, Any]]:
    """The seed, the stop strings, and what is left for ``model.generate``, with what it would trip over checked.

    Raises:
        CoreskipError: an option that there is not, a value that makes no sense, a seed where nothing is sampled.
    """
    options = {name: value for name, value in options.items() if (name, value) != ("generation_config", None)}
    seed, stops = options.pop("seed", None), options.pop("stop_strings", None)
    made = [name for name in _OF_THE_PROMPT if name in options]
    if made:
        raise CoreskipError(f"an engine makes {made[0]} of the prompt: leave it out")
    config = options.get("generation_config", model.generation_config)
    if not isinstance(config, GenerationConfig):
        raise CoreskipError(f"generation_config is {kind_of(config)}: give a transformers.GenerationConfig")
    _check_names(model, options)
    options = _greedy_at_zero(options)
    _check_values(options)
    for name in ("repetition_penalty", "encoder_repetition_penalty"):  # transformers refuses whole numbers
        if options.get(name) is not None:
            options[name] = float(options[name])
    beams = options.get("num_beams") or config.num_beams or 1
    if (options.get("num_return_sequences") or 1) > beams and not samples(model, options):
        raise CoreskipError("greedy text comes once: for several add do_sample=True, or as many num_beams")
    if seed is not None:
        check_seed(seed)
        if not samples(model, options):
            raise CoreskipError("a seed is of sampling: add do_sample=True, or leave it out")
    _check_together(config, options)
    return seed, _stop_strings(stops), options


def samples(model: Any, options: dict[str, Any]) -> bool:
    """Whether ``model.generate`` with these options draws tokens at random."""
    config = options.get("generation_config") or model.generation_config
    chosen = options.get("do_sample")
    return bool(config.do_sample if chosen is None else chosen)


def _check_names(model: Any, options: dict[str, Any]) -> None:
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")} | {"generation_config"}
    for function in (model.generate, model.forward, getattr(model, "prepare_inputs_for_generation", model.forward)):
        known |= _arguments(function)
    known |= {"streamer", "tokenizer", "assistant_tokenizer", "stopping_criteria", "logits_processor", "output_logits"}
    for name in options:
        if name not in known:
            offered = (set(vars(GenerationConfig())) | set(_OF_ENGINES)) - {"_from_model_config"}
            hint = closest(name, offered)
            hint = hint if hint.startswith("did") else "see transformers.GenerationConfig for what there is"
            raise CoreskipError(f"there is no option of generation {name!r}: {hint}")


def _arguments(function: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _greedy_at_zero(options: dict[str, Any]) -> dict[str, Any]:
    """A temperature of 0 is greedy: the limit of sampling at lower and lower ones."""
    temperature = options.get("temperature")
    if isinstance(temperature, bool) or temperature != 0:
        return options
    rest = {name: value for name, value in options.items() if name != "temperature"}
    return {**rest, "do_sample": False}


def _check_share(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise CoreskipError(f"{name} is {value!r}; it must be a share from 0 to 1")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise CoreskipError(f"{name} is {value!r}; it must be a number")


def _check_ids(name: str, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value = value.flatten().tolist()
    ids = value if isinstance(value, (list, tuple)) else [value]
    if not ids or any(isinstance(id, bool) or not isinstance(id, int) or id < -1 for id in ids):
        raise CoreskipError(f"{name} is {value!r}: give a token's id, or a list of them")


def _check_lists(name: str, value: Any) -> None:
    if not isinstance(value, (list, tuple, dict)) or not value:
        raise CoreskipError(f"{name} is {value!r}: see transformers.GenerationConfig for what it holds")


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise CoreskipError(f"{name} is {kind_of(value)}: give a tensor")


def _check_callables(name: str, value: Any) -> None:
    if not isinstance(value, list) or not all(map(callable, value)):
        raise CoreskipError(f"{name} is {kind_of(value)}: give a list of transformers' own, or of the like")


def _check_cache(name: str, value: Any) -> None:
    if not isinstance(value, Cache):
        raise CoreskipError(f"{name} is {kind_of(value)}: give a KV cache of transformers', such as a DynamicCache()")


def _check_model(name: str, value: Any) -> None:
    if not isinstance(value, nn.Module) or not hasattr(value, "generate"):
        raise CoreskipError(f"{name} is {kind_of(value)}: give a causal LM, as coreskip.load() returns")


def _check_callable(name: str, value: Any) -> None:
    if not callable(value):
        raise CoreskipError(f"{name} is {kind_of(value)}: give a function")


def _check_mapping(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise CoreskipError(f"{name} is {kind_of(value)}: give a dict")


def _check_streamer(name: str, value: Any) -> None:
    if not (hasattr(value, "put") and hasattr(value, "end")):
        raise CoreskipError(f"{name} is {kind_of(value)}: give one of transformers' streamers")


def _check_tokenizer(name: str, value: Any) -> None:
    if not callable(value):
        raise CoreskipError(f"{name} is {kind_of(value)}: give a tokenizer")


def _at_least(least: int) -> Callable[[str, Any], None]:
    return lambda name, value: check_count(name, value, least)


#: By kind of value, the options that have it.
_KINDS: tuple[tuple[Callable[[str, Any], None], tuple[str, ...]], ...] = (
    (
        _at_least(1),
        ("max_new_tokens", "max_length", "num_beams", "num_return_sequences", "prefill_chunk_size", "max_cache_len",
         "num_assistant_tokens", "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit",
         "assistant_lookbehind", "target_lookbehind", "num_beam_groups"),
    ),
    (
        _at_least(0),
        ("min_new_tokens", "min_length", "top_k", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    ),
    (check_temperature, ("temperature",)),
    (check_above_zero, ("repetition_penalty", "encoder_repetition_penalty", "max_time")),
    (_check_share, ("top_p", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff",
                    "assistant_confidence_threshold")),
    (_check_number, ("length_penalty", "diversity_penalty", "penalty_alpha", "guidance_scale")),
    (
        check_flag,
        ("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values", "token_healing", "output_scores",
         "output_logits", "output_attentions", "output_hidden_states", "return_dict_in_generate", "low_memory",
         "disable_compile", "use_mtp", "is_assistant", "synced_gpus"),
    ),
    (
        _check_ids,
        ("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id", "forced_bos_token_id",
         "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"),
    ),
    (_check_lists, ("bad_words_ids", "sequence_bias", "exponential_decay_length_penalty")),
    (_check_tensor, ("position_ids",)),
    (_check_callables, ("logits_processor", "stopping_criteria")),
    (_check_cache, ("past_key_values",)),
    (_check_model, ("assistant_model",)),
    (_check_tokenizer, ("tokenizer", "assistant_tokenizer")),
    (_check_callable, ("prefix_allowed_tokens_fn",)),
    (_check_mapping, ("cache_config",)),
    (_check_streamer, ("streamer",)),
)  # fmt: skip


def _check_values(options: dict[str, Any]) -> None:
    for check, names in _KINDS:
        for name in names:
            if options.get(name) is not None:
                check(name, options[name])


def _check_together(config: GenerationConfig, options: dict[str, Any]) -> None:
    """What transformers' own check of a configuration refuses, in one line."""
    merged = copy.deepcopy(config)
    own = {name: value for name, value in options.items() if hasattr(merged, name)}
    # else it would warn of what the model's own configuration holds; generation itself does that
    quiet: dict[str, Any] = (
        {"user_set_attributes": set()} if "user_set_attributes" in _arguments(merged.validate) else {}
    )
    try:
        merged.update(**own)
        merged.validate(**quiet)
    except Exception as error:  # by what it trips over, a wrong type among others
        reason = " ".join(str(error).split())
        raise CoreskipError(f"generation cannot run with these options: {reason}") from None


def _stop_strings(stops: Any) -> list[str]:
    if stops is None:
        return []
    found = [stops] if isinstance(stops, str) else list(stops) if isinstance(stops, (list, tuple, set)) else None
    if found is None or not all(isinstance(stop, str) for stop in found):
        raise CoreskipError(f"stop_strings is {stops!r}: give a text, or a list of them")
    if stops != "" and not all(found):
        raise CoreskipError("a stop string is empty")
    for stop in found:
        check_encodable("a stop string", stop)
    return [stop for stop in found if stop]


def check_length(model: Any, most: int | None, tokens: int, options: dict[str, Any]) -> None:
    """Raise `CoreskipError` where a prompt of so many tokens and its continuation have more positions than `most`, the
    model's `learned_positions`: looking up the next one would fail in the midst of the text."""
    if most is None:
        return
    new = _new_tokens(model, tokens, options)
    if tokens + new - 1 <= most:  # the last token is not looked up
        return
    kind = model.config.get_text_config().model_type
    if tokens > most:
        raise CoreskipError(f"the prompt has {tokens} tokens, and this {kind!r} model {most} positions: shorten it")
    raise CoreskipError(
        f"the prompt has {tokens} tokens, {new} more are asked for, and this {kind!r} model has {most} positions: give "
        f"max_new_tokens={most - tokens + 1} or less, or a shorter prompt"
    )


def _new_tokens(model: Any, tokens: int, options: dict[str, Any]) -> int:
    """How many are generated at most; 1 where that is left open."""
    config = options.get("generation_config") or model.generation_config
    for source in (options, vars(config)):
        new, length = source.get("max_new_tokens"), source.get("max_length")
        if new is not None:
            return int(new)
        if length is not None:
            return max(1, int(length) - tokens)
    return 1


def learned_positions(model: Any) -> int | None:
    """How many positions a model has a vector for, which it looks up (GPT-2, OPT); None where positions are
    computed. Found by its table: an embedding of positions, by name and size."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(most, int):
        return None
    for name, module in model.named_modules():
        called = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("pos" in called or called == "wpe"):
            extra = module.num_embeddings - most  # OPT's begins with two for padding
            return most if 0 <= extra <= 2 else None
        table: Any = getattr(module, "embed_positions", None)  # GPT-J and CodeGen look up rotary angles
        if not isinstance(table, nn.Module) and getattr(table, "ndim", 0) == 2 and len(table) == most:
            return most
    return None
