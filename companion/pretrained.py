"""Folders and modules: every model opens a published folder, and writes one that others open.

A folder holds ``config.json`` and one safetensors file. The configuration becomes a frozen
dataclass whose fields are the published keys; the weights fill a module whose attributes are the
published names. So there is nothing to translate, but for the few historical spellings below.
"""

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from companion import checkpoints
from companion.checkpoints import CheckpointError

# Names that files have or had elsewhere: where, the other name, ours (None: nothing to load).
OTHER_SPELLINGS = (
    # transformers 5 leaves out a prefix that every published Stable Diffusion folder carries.
    ("CLIPTextModel", r"(embeddings|encoder|final_layer_norm)\.(.*)", r"text_model.\1.\2"),
    # The numbers 0, 1, 2, … were stored as a buffer until transformers 4.31.
    (None, r"(.*\.)?embeddings\.position_ids", None),
    # Attention in the autoencoder and in UNet2DModel, until diffusers 0.17.
    (None, r"(.*attentions\.\d+)\.query\.(weight|bias)", r"\1.to_q.\2"),
    (None, r"(.*attentions\.\d+)\.key\.(weight|bias)", r"\1.to_k.\2"),
    (None, r"(.*attentions\.\d+)\.value\.(weight|bias)", r"\1.to_v.\2"),
    (None, r"(.*attentions\.\d+)\.proj_attn\.(weight|bias)", r"\1.to_out.0.\2"),
)

# The switches of diffusers' U-Nets that are no field of a config here, with the values under which
# they change nothing. Any other value is refused by name: the numbers would be other ones.
UNET_SWITCHES: dict[str, tuple[object, ...]] = {
    "act_fn": ("silu", "swish"),
    "add_attention": (True,),
    "addition_embed_type": (None,),
    "addition_time_embed_dim": (None,),
    "attention_type": ("default",),
    "attn_norm_num_groups": (None,),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0.0,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1.0,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "projection_class_embeddings_input_dim": (None,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "transformer_layers_per_block": (1,),
    "upcast_attention": (False, None),
    "use_linear_projection": (False,),
}
# These say nothing about the numbers: a default size, widths of parts that are not there.
UNET_NOTES = ("addition_embed_type_num_heads", "num_train_timesteps", "sample_size")


# The same for transformers' CLIP, and what 2022's files spell out although no number depends on it.
CLIP_SWITCHES: dict[str, tuple[object, ...]] = {
    "add_cross_attention": (False,),
    "attention_dropout": (0.0,),
    "chunk_size_feed_forward": (0,),
    "dropout": (0.0,),
    "is_decoder": (False,),
    "pruned_heads": ({},),
}
CLIP_NOTES = (
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label",
    "initializer_factor", "initializer_range", "is_encoder_decoder", "label2id", "length_penalty",
    "max_length", "min_length", "model_type", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_return_sequences", "output_attentions", "output_hidden_states",
    "output_scores", "pad_token_id", "prefix", "problem_type", "remove_invalid_values",
    "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id",
    "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss",
    "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "top_k", "top_p",
    "torchscript", "typical_p", "use_bfloat16",
)  # fmt: skip


class Pretrained(nn.Module):
    """A module that is built from a config and can be opened from, and saved to, a folder."""

    Config: ClassVar[type]
    published: ClassVar[str]  # the class name that stock libraries look for
    switches: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    notes: ClassVar[tuple[str, ...]] = ()
    filename: ClassVar[str] = "diffusion_pytorch_model.safetensors"
    config: Any

    @classmethod
    def fresh(cls, config: Any, generator: torch.Generator) -> Self:
        """A new module whose starting weights depend on ``generator`` alone."""
        seed = int(torch.randint(2**62, (), generator=generator))
        with torch.random.fork_rng(devices=[]):  # torch's layers draw from the global generator
            torch.default_generator.manual_seed(seed)  # manual_seed would reach every GPU too
            return cls(config)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        subfolder: str | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
    ) -> Self:
        """Open a folder: its ``config.json`` builds the module, its safetensors file fills it.

        Args:
            folder: A folder, or a hub id like ``"CompVis/stable-diffusion-v1-4"`` (``locate``).
            subfolder: The model's place inside it, such as ``"unet"``.
            dtype: Type of the parameters, whatever the file holds.
            revision: Commit, tag or branch on the hub.

        Raises:
            CheckpointError: Something is missing, truncated, altered, or not implemented here.
        """
        path = locate(folder, subfolder, revision=revision)
        config = checkpoints.read_config(path, cls.Config, cls.notes, cls.switches)
        with torch.device("meta"):  # no memory, no random numbers for what is replaced anyway
            model = cls(config).to(dtype)
        return checkpoints.load_into(model, path, rename=cls.rename).eval()

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        card: Mapping[str, object] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Path:
        """Write a folder that ``from_pretrained`` and the stock class named ``published`` open."""
        return checkpoints.save(
            folder, self, config=self.config_json(), card=card, dtype=dtype, filename=self.filename
        )

    def config_json(self) -> dict[str, object]:
        """What goes into ``config.json``."""
        return {"_class_name": self.published, **dataclasses.asdict(self.config)}

    @classmethod
    def rename(cls, name: str) -> str | None:
        """Our spelling of a stored name; ``None`` where there is nothing to load."""
        for where, other, ours in OTHER_SPELLINGS:
            if where in (None, cls.published) and (match := re.fullmatch(other, name)):
                return None if ours is None else match.expand(ours)
        return name


class TransformersModel(Pretrained):
    """The same for the models that stock looks for in transformers rather than in diffusers."""

    model_type: ClassVar[str]
    switches, notes = CLIP_SWITCHES, CLIP_NOTES
    filename = "model.safetensors"

    def config_json(self) -> dict[str, object]:
        plain = {k: v for k, v in dataclasses.asdict(self.config).items() if v is not None}
        # Trap: without "dtype", stock runs a text encoder stored in half in half, and crashes.
        head = {"architectures": [self.published], "model_type": self.model_type}
        return head | {"dtype": "float32"} | plain


def locate(
    folder: str | Path, subfolder: str | None = None, *, revision: str | None = None
) -> Path:
    """The folder on this disk that a caller means.

    A path is used as it is. Only a string that looks like ``owner/name``, where no such folder and
    no folder ``owner`` exists, is taken for a hub id: what is not in the local cache is then
    downloaded, after a message that says what and how much.

    Raises:
        CheckpointError: No such folder; or the hub cannot be reached, or does not know the id.
    """
    looks_like_id = isinstance(folder, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", folder)
    if looks_like_id and not Path(folder).exists() and not Path(folder).parent.exists():
        folder = _download(folder, subfolder, revision)
    return checkpoints.find_folder(folder, subfolder)


def _download(repo: str, subfolder: str | None, revision: str | None) -> str:
    """Fetch configs, tokenizer files and full-precision safetensors of a hub repository."""
    from fnmatch import fnmatch

    from huggingface_hub import HfApi, snapshot_download

    inside = f"{subfolder}/" if subfolder else "*"
    wanted = [f"{inside}{kind}" for kind in ("*.json", "*.txt", "*model.safetensors")]
    wanted.append("model_index.json")
    try:
        files = HfApi().model_info(repo, revision=revision, files_metadata=True).siblings or []
        files = [f for f in files if any(fnmatch(f.rfilename, w) for w in wanted)]
        logging.getLogger("companion").warning(
            "%s on the Hugging Face hub: %d files, %.2f GB; downloading what is not here yet.",
            repo, len(files), sum(f.size or 0 for f in files) / 1e9,
        )  # fmt: skip
        return snapshot_download(repo, revision=revision, allow_patterns=wanted)
    except Exception as first:  # its client changes the class of its errors from time to time
        try:  # the hub is out of reach, but an earlier download may be here
            return snapshot_download(
                repo, revision=revision, allow_patterns=wanted, local_files_only=True
            )
        except Exception:
            raise CheckpointError(
                f"{repo!r} is no folder here, and the Hugging Face hub could not give it ({first})."
                " Check the spelling, or download the folder elsewhere and give its path."
            ) from first
