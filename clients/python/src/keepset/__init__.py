"""Keepset: KV-cache retention as a service. See README.md beside the package."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from keepset.memory import SharedRegion
from keepset.types import (
    BFLOAT16,
    Budget,
    KeepSet,
    Layer,
    LayerGroup,
    LayerKept,
    ModelFingerprint,
    PagedKv,
    Result,
    ShadowResult,
    Span,
    TableIdentity,
    TablePin,
    kept_tokens_of_compression_ratio,
)

if TYPE_CHECKING:
    from keepset.channel import TlsFiles
    from keepset.client import Client
    from keepset.device_memory import DeviceRegion, ServiceDeviceRegion
    from keepset.errors import (
        InvalidInput,
        KeepsetError,
        NotFound,
        Overloaded,
        Refused,
        Unreachable,
    )
    from keepset.registry import TableRegistry

# Loaded when first used: keepset.eval runs, and trains under the system's Python, without gRPC.
_NEEDS_GRPC = {
    "Client": "keepset.client",
    "DeviceRegion": "keepset.device_memory",
    "ServiceDeviceRegion": "keepset.device_memory",
    "TableRegistry": "keepset.registry",
    "TlsFiles": "keepset.channel",
    "Operation": "keepset.operation",
    "InvalidInput": "keepset.errors",
    "KeepsetError": "keepset.errors",
    "NotFound": "keepset.errors",
    "Overloaded": "keepset.errors",
    "Refused": "keepset.errors",
    "Unreachable": "keepset.errors",
}

__all__ = [
    "BFLOAT16",
    "Budget",
    "Client",
    "DeviceRegion",
    "InvalidInput",
    "KeepSet",
    "KeepsetError",
    "Layer",
    "LayerGroup",
    "LayerKept",
    "ModelFingerprint",
    "NotFound",
    "Operation",
    "Overloaded",
    "PagedKv",
    "Refused",
    "Result",
    "ServiceDeviceRegion",
    "ShadowResult",
    "SharedRegion",
    "Span",
    "TableIdentity",
    "TablePin",
    "TableRegistry",
    "TlsFiles",
    "Unreachable",
    "kept_tokens_of_compression_ratio",
]


def __getattr__(name: str) -> object:
    if name not in _NEEDS_GRPC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_NEEDS_GRPC[name]), name)
