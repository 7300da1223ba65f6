"""Shapes of published models, and how inference engines divide them over GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from kvq_calib.errors import ConfigError
from kvq_calib.schema.geometry import LayerGeometry

__all__ = ["SHAPES", "ModelShape", "model_shape", "stages"]


@dataclass(frozen=True)
class ModelShape:
    """The shape of a model: what determines the size of its cache and its weights.

    Attributes:
        name: name on the command line.
        layers: shapes of the attention layers.
        parameters: number of weights.
    """

    name: str
    layers: tuple[LayerGeometry, ...]
    parameters: float

    @property
    def weight_bytes(self) -> float:
        """Bytes of the weights in 16 bits."""
        return 2 * self.parameters


def _shape(
    name: str,
    layers: int,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    billions: float,
    window: int | None = None,
    full_every: int = 0,
) -> ModelShape:
    """A model of equal layers. With ``full_every``, only every such layer sees beyond ``window``."""

    def layer(index: int) -> LayerGeometry:
        full = window is None or (full_every > 0 and (index + 1) % full_every == 0)
        return LayerGeometry(
            num_query_heads=query_heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            sliding_window=None if full else window,
        )

    return ModelShape(name, tuple(layer(index) for index in range(layers)), 1e9 * billions)


SHAPES: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        _shape("llama-7b", 32, 32, 32, 128, 6.738),
        _shape("llama-13b", 40, 40, 40, 128, 13.016),
        _shape("llama-30b", 60, 52, 52, 128, 32.529),
        _shape("llama-65b", 80, 64, 64, 128, 65.286),
        _shape("llama-2-7b", 32, 32, 32, 128, 6.738),
        _shape("llama-2-13b", 40, 40, 40, 128, 13.016),
        _shape("llama-2-70b", 80, 64, 8, 128, 68.977),
        _shape("llama-3-8b", 32, 32, 8, 128, 8.030),
        _shape("llama-3-70b", 80, 64, 8, 128, 70.554),
        _shape("mistral-7b", 32, 32, 8, 128, 7.242),  # without the window of its first release
        _shape("qwen3-8b", 36, 32, 8, 128, 8.191),
        _shape("gemma-3-27b", 62, 32, 16, 128, 27.009, window=1024, full_every=6),
        _shape("smollm2-135m", 30, 9, 3, 64, 0.1345),
    )
}
"""Published models by name."""


def model_shape(name: str) -> ModelShape:
    """The shape of a model, by name.

    Raises:
        ConfigError: there is no such shape; the message lists them.
    """
    shape = SHAPES.get(name.lower())
    if shape is None:
        raise ConfigError(f"unknown shape {name!r}; use one of {', '.join(SHAPES)}")
    return shape


def stages(shape: ModelShape, gpus: int) -> tuple[int, list[ModelShape]]:
    """How inference engines divide a model over GPUs: heads over as many as possible, layers over the rest.

    Args:
        shape: shape of the model.
        gpus: number of GPUs.

    Returns:
        The number of GPUs that share each layer (tensor parallel), and the layers on one GPU in each stage of the
        pipeline. The former is the largest divisor of ``gpus`` that divides the query heads and the key-value heads of
        every layer. Stages are as even as possible, longer ones first.

    Raises:
        ConfigError: there are more stages than layers.
    """
    counts = {n for layer in shape.layers for n in (layer.num_kv_heads, layer.num_query_heads)}
    tensor = max(n for n in range(1, gpus + 1) if gpus % n == 0 and not any(count % n for count in counts))
    depth = gpus // tensor
    if depth > len(shape.layers):
        raise ConfigError(
            f"{gpus} GPUs cannot divide {len(shape.layers)} layers whose heads go to {tensor} GPUs at most; use fewer"
        )
    split = [
        layer.model_copy(
            update={
                "num_kv_heads": layer.num_kv_heads // tensor,
                "num_query_heads": layer.num_query_heads // tensor,
            }
        )
        for layer in shape.layers
    ]
    size, longer = divmod(len(split), depth)
    ends = [number * size + min(number, longer) for number in range(depth + 1)]
    parts = [
        ModelShape(shape.name, tuple(split[first:stop]), shape.parameters / gpus)
        for first, stop in pairwise(ends)
    ]
    return tensor, parts
