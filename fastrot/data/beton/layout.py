"""FFCV's `.beton` on disk, byte for byte (FFCV 1.0.2, file version 2).

    header | field descriptors | rows (metadata) | pages of records | table
    24     | 1,041 a field     | aligned structs |                  | 24 a record, to the end of the file

The header is written last, so that an unfinished file has version 0. README.md says what FFCV needs and does not check.
"""

import numpy as np

VERSION = 2
PAGE = 2**23  # bytes; the page that FFCV's own writer uses, a power of two
FLOAT, INT, IMAGE = 0, 1, 2  # types of fields; 3 to 6: bytes, array, json, tensor
JPG, RAW = 0, 1  # modes of an image

HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("rows", "<u8"), ("table", "<u8")],
    align=True,
)
FIELD = np.dtype([("type", "u1"), ("name", "S16"), ("args", "V1024")], align=True)
PICTURE = np.dtype(
    [("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("ptr", "<u8")]
)  # 13 bytes
TABLE = np.dtype([("row", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
BLOB = np.dtype([("ptr", "<u8"), ("size", "<u8")])
TYPES = {FLOAT: "<f8", INT: "<i8", IMAGE: PICTURE, 3: BLOB, 4: "<u8", 5: BLOB, 6: "<u8"}  # in a row
# ours: image, label, index
ROW = np.dtype([("f0", PICTURE), ("f1", "<i8"), ("f2", "<i8")], align=True)
NAMES = (("image", IMAGE), ("label", INT), ("index", INT))  # the fields that our writer writes
