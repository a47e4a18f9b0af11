"""What a wrapped model, and one that generates by it, does differently itself: generation, and what would go past the
wrapping (loading, copying, casting)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from ..predictors.errors import CoreskipError
from . import assisted, loop
from .behaviour import note_abstentions
from .delegates import generator_of
from .parts import Watched
from .phases import prefilling
from .steps import Lowering
from .wrapping import Runtime
from .wrapping import runtime_of as runtime_of_generator


def runtime_of(model: nn.Module) -> Runtime:
    """The runtime that `wrap` installed on `model`, or on the model inside it by which it generates.

    Raises:
        CoreskipError: the model is not wrapped.
    """
    return runtime_of_generator(generator_of(model))


class _Outer:
    """What a wrapped model, and one that generates by it, can do besides (be a context manager) or not."""

    def __enter__(self) -> Any:
        runtime_of(cast(nn.Module, self)).check_removable()  # else the block's end would raise, whatever came before
        return self

    def __exit__(self, *exception: object) -> None:
        runtime_of(cast(nn.Module, self)).remove()

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        runtime_of(cast(nn.Module, self)).refuse("load weights")
        result = super().load_state_dict(*args, **kwargs)  # type: ignore[misc]
        runtime_of(cast(nn.Module, self)).repack()
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise CoreskipError("a wrapped model cannot be copied: call coreskip.unwrap(model) first")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CoreskipError("a wrapped model cannot be pickled: call coreskip.unwrap(model) first")


class _Wrapped(_Outer, Watched):
    """What a wrapped model does itself: mark ``generate``'s prefill, draft, decode natively."""

    def _prefill(
        self, input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], is_first_iteration: bool = True
    ) -> Any:
        arguments = (input_ids, generation_config, model_kwargs, is_first_iteration)
        if not is_first_iteration:  # an assistant goes on drafting: its cache's state tells
            return super()._prefill(*arguments)  # type: ignore[misc]
        with prefilling(model_kwargs.get("attention_mask")):
            output = super()._prefill(*arguments)  # type: ignore[misc]
        note_abstentions(getattr(output, "past_key_values", None))
        return output

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Greedy search and sampling, which transformers send here alike."""
        runtime, (rows, prompt) = runtime_of(cast(nn.Module, self)), input_ids.shape[:2]
        with runtime.memory.holding(rows, prompt, max(prompt + 1, generation_config.max_length or 0)):
            return self._sample_within(
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, model_kwargs
            )

    def _sample_within(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool,
        streamer: Any,
        model_kwargs: dict[str, Any],
    ) -> Any:
        """The same, where there is room."""
        arguments = {
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "generation_config": generation_config,
            "synced_gpus": synced_gpus,
            "streamer": streamer,
        }
        plain = functools.partial(super()._sample, input_ids, **arguments, **model_kwargs)  # type: ignore[misc]
        runtime = runtime_of(cast(nn.Module, self))
        exact = runtime.exact
        if (
            runtime.steps.native.exits_early
        ):  # it drafts for itself by its first layers: what is measured is of all of them
            return plain()
        arguments["model_kwargs"] = model_kwargs
        if exact is not None:
            runtime.notice()  # before anything that was measured on the model is used
            return exact.generate(self, plain, input_ids, arguments, runtime.steps.passes)

        def undrafted() -> Any:
            output = loop.generate(runtime.steps, self, input_ids, arguments)
            return plain() if output is None else output

        lookup = runtime.lookup
        hooked = lookup is not None and runtime.notice() is not None  # it would be measured on the modules
        if lookup is None or hooked or runtime.steps.lowering is Lowering.MODULES:
            return undrafted()
        lookup.by_rows, lookup.native_only = runtime.steps.lowering is Lowering.NATIVE, True
        return lookup.generate(self, undrafted, input_ids, arguments, runtime.steps.passes)

    def _assisted_decoding(
        self, input_ids: Tensor, *, generation_config: Any, inputs_tensor: Any = None, **options: Any
    ) -> Any:
        options = {"generation_config": generation_config, "inputs_tensor": inputs_tensor, **options}
        plain = super()._assisted_decoding  # type: ignore[misc]
        if not runtime_of(cast(nn.Module, self)).program.decodes_otherwise:
            return plain(input_ids, **options)
        return assisted.decode(plain.__func__, self, input_ids, options)

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        return False  # the patched forward keeps state between steps that a captured graph would freeze

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        runtime_of(cast(nn.Module, self)).refuse("move or cast the model")
        result = super()._apply(fn, recurse)  # type: ignore[misc]
        runtime_of(cast(nn.Module, self)).repack()
        return result

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        runtime = runtime_of(cast(nn.Module, self))
        if runtime.packed_alone(cast(Any, self).get_output_embeddings()) is not None:
            runtime.refuse("resize its embeddings")
        return super().resize_token_embeddings(*args, **kwargs)  # type: ignore[misc]


@functools.cache
def wrapped_class(cls: type) -> type:
    """A subclass of the same name, for a model that is wrapped."""
    return _with(_Wrapped, cls)


@functools.cache
def outer_class(cls: type) -> type:
    """A subclass of the same name, for a model that generates by a wrapped one."""
    return _with(_Outer, cls)


def _with(more: type, cls: type) -> type:
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (more, cls), names)
