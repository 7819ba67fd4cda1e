"""The settings of a nanochat model with modern additions, for Hugging Face transformers (trust_remote_code)."""

from transformers import PretrainedConfig


class NanoChatModernConfig(PretrainedConfig):
    """Every addition is a switch; with all of them off it is transformers' own NanoChat model."""

    model_type = "nanochat_modern"
    keys_to_ignore_at_inference = ("cache", "past_key_values")

    def __init__(
        self,
        vocab_size=65536,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        final_logit_softcapping=15.0,
        rope_base=10000.0,
        qk_scale=1.0,
        key_offset=False,
        windows=None,
        residual_scalars=False,
        value_embedding_layers=(),
        value_gate_channels=12,
        smear=False,
        smear_gate_channels=24,
        backout=False,
        bigram_buckets=0,
        bigram_hash=(1, 1),
        use_cache=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.final_logit_softcapping = final_logit_softcapping
        self.rope_base = rope_base
        self.qk_scale = qk_scale
        self.key_offset = key_offset
        self.windows = list(windows) if windows else [None] * num_hidden_layers
        self.residual_scalars = residual_scalars
        self.value_embedding_layers = list(value_embedding_layers)
        self.value_gate_channels = value_gate_channels
        self.smear = smear
        self.smear_gate_channels = smear_gate_channels
        self.backout = backout
        self.bigram_buckets = bigram_buckets
        self.bigram_hash = list(bigram_hash)
        self.use_cache = use_cache
        super().__init__(**kwargs)
