"""A quantizer's parameters in the form that the native call for whole blocks takes."""

from __future__ import annotations

from kvq_calib.codec.quantizer import Quantizer
from kvq_calib.codec.scalar import ScalarQuantizer
from kvq_calib.codec.trellis import TrellisQuantizer
from kvq_calib.native.close import BlockTables
from kvq_calib.native.encode import TrellisTables
from kvq_calib.native.encode_scalar import ScalarTables

__all__ = ["block_tables"]


def block_tables(quantizer: Quantizer) -> BlockTables | None:
    """Tables to code and pack blocks; ``None`` if only :meth:`Quantizer.quantize` can do it.

    The parameters must be on the CPU, and must not be changed in place afterwards.
    """
    tables: TrellisTables | ScalarTables
    if type(quantizer) is TrellisQuantizer:
        tables, by_size = quantizer.native_tables, quantizer.spec.token_weighting
        if not tables.is_exact:
            return None
    elif type(quantizer) is ScalarQuantizer and quantizer.cannot_stream() is None:
        tables, by_size = quantizer.native_tables, False
    else:
        return None
    return BlockTables(tables, by_size, quantizer.layout.width_table, quantizer.storage)
