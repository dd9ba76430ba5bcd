"""How a model is trained."""

from typing import Literal

Method = Literal["full", "lora", "lisa"]
