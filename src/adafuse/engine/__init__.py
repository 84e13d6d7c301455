"""engine: decoding with fixed buffers. Reads a HuggingFace model's weights and runs the blocks itself, a token a step."""

from adafuse.engine.engine import Engine
from adafuse.engine.sequence import Generation, TokenLogprob

__all__ = ["Engine", "Generation", "TokenLogprob"]
