"""names: what the parts of the plugin, and the settings of a server, call each other. Imports nothing."""

PREFIX = "AdaFuse"  # in front of the name of an architecture of vLLM's
NATIVE = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Gemma3ForCausalLM",
)
FALLBACK = "TransformersForCausalLM"  # vLLM's class that runs a model of transformers with vLLM's linears and attention
ARCHITECTURES = (*NATIVE, FALLBACK)

# Keys of vLLM's `hf_overrides`, which become attributes of the model's config.
ADAPTER = "adafuse_adapter"  # the adapter's folder
DIGEST = "adafuse_digest"  # SHA-256 of its weights file when the server was started; may be left out

# What a request says to be answered by the base without adapter.
BARE = "adafuse_bare"
SALTS = {True: "bare:", False: "adapted:"}  # in front of the cache salts of requests without and with adapter

ALONE = "adafuse_alone"  # a key of the overrides: whether the server answers for no base, whatever a request says
INTERVAL = "adafuse_load_interval"  # a key of the overrides: seconds between reports of the experts' load
STEP = "adafuse.step"  # where a model's Step is found, in the context that vLLM keeps for its layers
