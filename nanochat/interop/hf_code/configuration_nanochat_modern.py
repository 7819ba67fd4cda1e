"""The settings of a nanochat model with modern additions, for Hugging Face transformers (trust_remote_code)."""

from transformers import PretrainedConfig

# With these it is transformers' own NanoChat model: every addition is a switch, and off.
DEFAULTS = {
    "vocab_size": 65536,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "final_logit_softcapping": 15.0,
    "use_cache": True,
    "rope_base": 10000.0,
    "qk_scale": 1.0,
    "key_offset": False,
    "windows": None,
    "residual_scalars": False,
    "residual_factors": False,
    "value_embedding_layers": [],
    "value_gate_channels": 12,
    "smear": False,
    "smear_gate_channels": 24,
    "backout": False,
    "recall": 0,
    "recall_lengths": [2, 8],
    "recall_followers": 64,
    "recall_neighbours": 96,
    "recall_window": 128,
    "recall_levels": [12, 8],
    "recall_common": 200,
    "recall_sureness": [4, 4],
}


class NanoChatModernConfig(PretrainedConfig):
    """Holds what config.json says; `windows` is one per layer, None where a layer sees the whole context."""

    model_type = "nanochat_modern"
    keys_to_ignore_at_inference = ("cache", "past_key_values")

    def __init__(self, **settings):
        for name, default in DEFAULTS.items():
            setattr(self, name, settings.pop(name, default))
        self.windows = self.windows or [None] * self.num_hidden_layers
        super().__init__(**settings)  # what it does not know becomes an attribute too
