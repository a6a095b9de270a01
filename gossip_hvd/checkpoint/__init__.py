"""Checkpoints of a whole job: one file a node, whole or refused, the same one on all nodes.

    directory/checkpoint-000007/manifest.json            names all files, their sizes and digests
    directory/checkpoint-000007/node0000.safetensors     all that the ranks of node 0 hold

``trees`` turns nested state into JSON and tensors, ``tensors`` is the file's layout, ``manifest``
the list of files, ``folder`` what one rank does with its disk, ``job`` what all ranks do together,
``merge`` the mean of all nodes for a job of another shape. Nothing is unpickled.
"""
