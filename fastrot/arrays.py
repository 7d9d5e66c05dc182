"""Arrays that many signatures name: n rows of prepared data or of anything else, b of them in a batch."""

import numpy as np
from jaxtyping import Int32, Int64, UInt8, UInt64

Picture = UInt8[np.ndarray, "h w 3"]
Bytes = UInt8[np.ndarray, " n"]
Numbers = Int64[np.ndarray, " n"]
Keys = UInt64[np.ndarray, " n"]  # hashes of paths
Sizes = Int32[np.ndarray, "n 2"]  # heights and widths, upright
Rows = Int64[np.ndarray, " b"]
RowSizes = Int32[np.ndarray, "b 2"]
Boxes = Int64[np.ndarray, "b 6"]  # index, y, x, height, width, flip
