"""Tiny models of many architectures, with the inputs of one training step each."""

import torch
import transformers as hf

TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = TOKENS | {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
HEADS = DECODER | {"head_dim": 8}
ENCODER = {k: v for k, v in DECODER.items() if k != "num_key_value_heads"}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
OLD = TOKENS | {"hidden_size": 16, "n_layer": 3, "n_head": 2}


def llava():
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**VISION, projection_dim=16),
            text_config=hf.LlamaConfig(**DECODER),
            image_token_index=3,
        )
    )


def qwen2_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 8}
    return hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(text_config=DECODER | {"rope_parameters": rope}, vision_config=vision)
    )


def whisper():
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            **TOKENS,
            d_model=16,
            encoder_layers=2,
            decoder_layers=3,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=20,
            decoder_start_token_id=1,
        )
    )


def wav2vec2():
    return hf.Wav2Vec2ForCTC(
        hf.Wav2Vec2Config(
            **ENCODER,
            conv_dim=(16,) * 7,  # as many weights in the feature extractor as in the layers
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            mask_time_length=2,
        )
    )


def hubert():
    return hf.HubertForSequenceClassification(
        hf.HubertConfig(
            **ENCODER,
            conv_dim=(16,) * 7,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            mask_time_length=2,
        )
    )


def t5():
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            d_model=16, d_kv=8, d_ff=24, num_layers=3, num_decoder_layers=2, num_heads=2,
            vocab_size=64, decoder_start_token_id=0,
        )
    )  # fmt: skip


# name -> (model, stacks with their number of layers, groups that must hold something)
TIED, UNTIED = {"embed", "norm"}, {"embed", "head", "norm"}
ARCHITECTURES = {
    "llama": (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER)), {"model.layers": 3}, UNTIED
    ),
    "qwen3": (
        lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**HEADS)), {"model.layers": 3}, UNTIED
    ),
    "gemma2": (
        lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**HEADS)), {"model.layers": 3}, TIED
    ),
    "gemma3": (
        lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**HEADS)), {"model.layers": 3}, TIED
    ),
    "mistral": (
        lambda: hf.MistralForCausalLM(hf.MistralConfig(**DECODER)), {"model.layers": 3}, UNTIED
    ),
    "phi3": (lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**DECODER)), {"model.layers": 3}, UNTIED),
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**OLD)), {"transformer.h": 3}, TIED),
    "gpt_neox": (
        lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**ENCODER)), {"gpt_neox.layers": 3}, UNTIED
    ),
    "opt": (
        lambda: hf.OPTForCausalLM(hf.OPTConfig(**ENCODER, ffn_dim=24, word_embed_proj_dim=8)),
        {"model.decoder.layers": 3},
        TIED,
    ),
    "falcon": (
        lambda: hf.FalconForCausalLM(hf.FalconConfig(**ENCODER)), {"transformer.h": 3}, TIED
    ),
    "bloom": (lambda: hf.BloomForCausalLM(hf.BloomConfig(**OLD)), {"transformer.h": 3}, TIED),
    "mixtral": (
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**DECODER, num_local_experts=4)),
        {"model.layers": 3},
        UNTIED,
    ),
    "qwen3_moe": (
        lambda: hf.Qwen3MoeForCausalLM(
            hf.Qwen3MoeConfig(
                **HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8
            )
        ),
        {"model.layers": 3},
        UNTIED,
    ),
    "bert": (
        lambda: hf.BertForMaskedLM(hf.BertConfig(**ENCODER)), {"bert.encoder.layer": 3}, UNTIED
    ),
    "bert_classifier": (
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**ENCODER)),
        {"bert.encoder.layer": 3},
        UNTIED,
    ),
    "llama_reward": (
        lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**DECODER, num_labels=1)),
        {"model.layers": 3},
        UNTIED,
    ),
    "t5": (t5, {"encoder.block": 3, "decoder.block": 2}, TIED),
    "whisper": (whisper, {"model.encoder.layers": 2, "model.decoder.layers": 3}, TIED),
    "vit": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION)), {"vit.layers": 2}, UNTIED
    ),
    "wav2vec2": (wav2vec2, {"wav2vec2.encoder.layers": 3}, UNTIED),
    "hubert": (hubert, {"hubert.encoder.layers": 3}, UNTIED),
    "llava": (llava, {"model.language_model.layers": 3}, UNTIED),
    "qwen2_vl": (qwen2_vl, {"model.language_model.layers": 3}, UNTIED),
}  # fmt: skip

# The same models for training, and more: name -> function.
MODELS = {name: build for name, (build, _, _) in ARCHITECTURES.items()} | {
    "albert": lambda: hf.AlbertForMaskedLM(hf.AlbertConfig(**ENCODER, embedding_size=8)),
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(**TOKENS, hidden_size=16, state_size=4, num_hidden_layers=3)
    ),
}
# Tensors that a training step of the library's own does not reach: Llava takes the output of the
# last layer but one of its tower, and Qwen2-VL gets no picture.
UNUSED = {"llava": 18, "qwen2_vl": 31}


def build(name):
    torch.manual_seed(0)
    return MODELS[name]().train()


def inputs(name):
    """One batch, the same every time."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(4, 60, (2, 8), generator=generator)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    if name == "vit":
        return {"pixel_values": noise(2, 3, 16, 16), "labels": torch.tensor([0, 1])}
    if name == "wav2vec2":
        return {"input_values": noise(2, 4000), "labels": ids[:, :3]}
    if name == "hubert":
        return {"input_values": noise(2, 4000), "labels": torch.tensor([0, 1])}
    if name == "whisper":
        return {"input_features": noise(2, 8, 40), "labels": ids}
    if name.endswith(("classifier", "reward")):
        labels = torch.tensor([0, 1]) if name == "bert_classifier" else noise(2, 1)
        return {"input_ids": ids, "labels": labels}
    if name == "llava":
        ids[:, :4] = 3  # four patches stand for the picture
        return {"input_ids": ids, "labels": ids, "pixel_values": noise(2, 3, 16, 16)}
    return {"input_ids": ids, "labels": ids}
