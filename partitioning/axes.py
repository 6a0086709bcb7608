"""The one vocabulary of logical axis names, for parameters and activations alike."""

BATCH = "batch"
LENGTH = "length"
EMBED = "embed"
HEADS = "heads"
KV = "kv"
MLP = "mlp"
VOCAB = "vocab"
EXPERT = "expert"
LAYERS = "layers"
STATE = "state"

AXES = (BATCH, LENGTH, EMBED, HEADS, KV, MLP, VOCAB, EXPERT, LAYERS, STATE)

# A leaf with one of these axes holds many independent layers or experts; optimizers see one of them at a time.
STACKED = (LAYERS, EXPERT)

# Slices come first: the compiler then finds what each of them may do alone.
MESH_AXES = ("slice", "data", "fsdp", "tensor", "expert", "sequence")
