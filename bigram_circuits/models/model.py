"""The type of a hooked model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Protocol

    from torch import Tensor, nn

    class Model(Protocol):
        """What this package uses of a TransformerLens `TransformerBridge`, as `load_model` gives one."""

        cfg: Any
        """Its configuration: `n_layers`, `d_model`, `d_vocab`, `device`, `dtype`, `model_name`, ..."""
        tokenizer: Any
        """A Hugging Face tokenizer, or None."""
        training: bool
        """Whether it is in training mode."""
        blocks: Any
        """Its transformer blocks."""
        adapter: Any
        """What TransformerLens knows of its architecture."""
        original_model: Any
        """The Hugging Face model within."""
        hook_dict: Mapping[str, Any]
        """Its hook points by name."""
        ln_final: Any
        """The final norm."""
        unembed: Any
        """The unembedding."""

        @property
        def W_E(self) -> Tensor:  # noqa: N802 (the field's name)
            """The token embedding, [d_vocab, d_model]."""
            ...

        @property
        def W_U(self) -> Tensor:  # noqa: N802 (the field's name)
            """The unembedding, [d_model, d_vocab]."""
            ...

        @property
        def b_U(self) -> Tensor:  # noqa: N802 (the field's name)
            """The unembedding's bias, [d_vocab]."""
            ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """Logits [batch, pos, d_vocab] of token ids, or of text."""
            ...

        def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
            """A forward pass with functions at hook points."""
            ...

        def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
            """A forward pass, and all its activations."""
            ...

        def to_tokens(self, *args: Any, **kwargs: Any) -> Tensor:
            """Token ids of text."""
            ...

        def generate(self, *args: Any, **kwargs: Any) -> Any:
            """Text that goes on from a prompt."""
            ...

        def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
            """All its parameters."""
            ...

        def modules(self) -> Iterator[Any]:
            """All its modules."""
            ...

        def state_dict(self) -> dict[str, Any]:
            """Its tensors by name."""
            ...

        def to(self, *args: Any, **kwargs: Any) -> Any:
            """Move it to a device."""
            ...

        def eval(self) -> Any:
            """Put it into eval mode."""
            ...
else:
    Model = Any
