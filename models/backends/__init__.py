"""How the attention product is computed: one file a back end."""
