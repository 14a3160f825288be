"""A layer's keys and values while replies are written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

_HEADROOM = 64  # columns that a buffer grows by


class CacheColumns(DynamicLayer):
    """Keys and values in buffers with room to the right, so that a step copies one column."""

    keys: Tensor
    values: Tensor
    _key_buffer: Tensor
    _value_buffer: Tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds columns; returns all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.hold(key_states, value_states)
            return self.keys, self.values
        begin, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if end > self._key_buffer.shape[2]:
            self._make_room(end)
        self._key_buffer[:, :, begin:end] = key_states
        self._value_buffer[:, :, begin:end] = value_states
        self.keys, self.values = self._key_buffer[:, :, :end], self._value_buffer[:, :, :end]
        return self.keys, self.values

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Takes these columns in the place of what was there."""
        self.keys, self.values = keys, values
        self._key_buffer, self._value_buffer = keys, values

    def _make_room(self, columns: int) -> None:
        missing = columns + _HEADROOM - self.keys.shape[2]

        def wider(tensor: Tensor) -> Tensor:
            return torch.nn.functional.pad(tensor, (0, 0, 0, missing))

        self._key_buffer, self._value_buffer = wider(self.keys), wider(self.values)
