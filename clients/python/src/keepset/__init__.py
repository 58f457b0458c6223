"""Keepset: KV-cache retention as a service. See README.md beside the package."""

from keepset.client import Client, Operation
from keepset.errors import (
    InvalidInput,
    KeepsetError,
    NotFound,
    Overloaded,
    Refused,
    Unreachable,
)
from keepset.memory import SharedRegion
from keepset.types import (
    BFLOAT16,
    Budget,
    KeepSet,
    Layer,
    LayerKept,
    ModelFingerprint,
    PagedKv,
    Result,
    Span,
    TableIdentity,
    TablePin,
    kept_tokens_of_compression_ratio,
)

__all__ = [
    "BFLOAT16",
    "Budget",
    "Client",
    "InvalidInput",
    "KeepSet",
    "KeepsetError",
    "Layer",
    "LayerKept",
    "ModelFingerprint",
    "NotFound",
    "Operation",
    "Overloaded",
    "PagedKv",
    "Refused",
    "Result",
    "SharedRegion",
    "Span",
    "TableIdentity",
    "TablePin",
    "Unreachable",
    "kept_tokens_of_compression_ratio",
]
