"""The ground: what a module is, how it changes a projection, base models, files in and out, meshes.

One legend of axis letters serves the whole package, in shape comments, einsum strings and weight
tables alike:

    B batch     T position   S key position   N layer          M module (expert)
    I in        O out        R rank           D width          H heads x head width
    K key-value heads        G query heads a key-value head    C head width
    F hidden    V vocabulary    U bucket of relative positions
    L label     Y token type
"""

__version__ = "0.1.0"
