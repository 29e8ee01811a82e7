"""The type of a hooked model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Protocol

    from torch import Tensor, nn

    class Model(Protocol):
        """The part of TransformerLens' `TransformerBridge` that this package uses; `load_model` returns one."""

        cfg: Any
        """Its configuration: `n_layers`, `d_model`, `d_vocab`, `device`, `dtype`, `model_name`, ..."""
        tokenizer: Any
        """A Hugging Face tokenizer, or None."""
        training: bool
        """Whether it is in training mode."""
        blocks: Any
        """Its transformer blocks."""
        adapter: Any
        """TransformerLens' adapter for its architecture."""
        original_model: Any
        """The wrapped Hugging Face model."""
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
            """Compute logits [batch, pos, d_vocab] for token ids or text."""
            ...

        def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
            """Run a forward pass with functions at hook points."""
            ...

        def add_hook(self, *args: Any, **kwargs: Any) -> None:
            """Add a function at a hook point."""
            ...

        def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
            """Run a forward pass and return its output and all activations."""
            ...

        def to_tokens(self, *args: Any, **kwargs: Any) -> Tensor:
            """Tokenise text into token ids."""
            ...

        def generate(self, *args: Any, **kwargs: Any) -> Any:
            """Generate a continuation of a prompt."""
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
            """Switch to eval mode."""
            ...
else:
    Model = Any
