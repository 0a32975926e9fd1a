"""Things that must be refused: `Place(folder)["name"]` makes what `make_name` says, in a folder of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

import locum
from making.checkpoints import write_checkpoint, write_text, write_tokenizer


class Place:
    """A folder for one test; `place.name` makes what is called so, once."""

    def __init__(self, folder: Path, **given: Path) -> None:
        self.folder, self.given = folder, given

    def __getitem__(self, name: str) -> Path:
        if name not in self.given:
            self.given[name] = globals()[f"make_{name}"](self)
        return self.given[name]

    def copy(self, name: str, to: str) -> Path:
        return Path(shutil.copytree(self[name], self.folder / to))


def make_nowhere(place):
    return place.folder / "nowhere"


def make_file(place):
    return write_text(place.folder / "file", 100)


def make_inside_file(place):
    return place["file"] / "out"


def make_empty_folder(place):
    (place.folder / "empty").mkdir()
    return place.folder / "empty"


def make_dense(place):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=320, **sizes)).save_pretrained(place.folder / "dense")
    write_tokenizer(place.folder / "dense")
    return place.folder / "dense"


def make_refused(place):
    folder = place.copy("model", "refused")
    AutoConfig.for_model("zaya").save_pretrained(folder)
    return folder


def make_unheard_of(place):
    return with_config(place, model_type="olmo3_moe_x")


def make_mistyped(place):
    return with_config(place, hidden_size="wide")


def make_quantised(place):
    return with_config(place, quantization_config={"quant_method": "gptq", "bits": 4})


def make_of_the_future(place):
    return with_config(place, source="small", quantization_config={"quant_method": "locum", "format_version": 99})


def make_not_json(place):
    folder = place.copy("model", "model")
    (folder / "config.json").write_text('{"model_type": ')
    return folder


def with_config(place, source="model", **changes):
    folder = place.copy(source, "model")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_sharded(place):
    folder = place.copy("model", "sharded")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({n: tensors[n] for n in names if where[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def make_lacks_shard(place):
    (place["sharded"] / "model-00002-of-00002.safetensors").unlink()
    return place["sharded"]


def make_truncated(place):
    folder = place.copy("model", "truncated")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    return folder


def make_stub(place):
    folder = place.copy("model", "stub")
    (folder / "model.safetensors").write_bytes(b"<html>404</html>")
    return folder


def make_no_weights(place):
    folder = place.copy("model", "no_weights")
    (folder / "model.safetensors").unlink()
    return folder


def make_pickled(place):
    (place["no_weights"] / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return place["no_weights"]


def make_no_tokenizer(place):
    folder = place.copy("model", "no_tokenizer")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    return folder


def make_lacks_tensor(place):
    folder = place.copy("model", "lacks_tensor")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def make_other_model(place):
    return write_checkpoint(place.folder / "other", "qwen3_moe")


def make_changed(place):
    """The model with other weights: same shape, other fingerprint."""
    return write_checkpoint(place.folder / "changed", seed=5)


def make_other_words(place):
    """The model with another tokenizer."""
    folder = place.copy("model", "other_words")
    write_tokenizer(folder, seed=9)
    return folder


def make_other_vocabulary(place):
    return write_checkpoint(place.folder / "other_vocabulary", vocab_size=352)


def make_other_stats(place):
    out = place.folder / "other.safetensors"
    locum.calibrate(place["changed"], data=str(place["words"]), tokens=256, length=64, out=out)
    return out


def make_torn_stats(place):
    data = place["stats"].read_bytes()
    (place.folder / "torn.safetensors").write_bytes(data[: len(data) // 2])
    return place.folder / "torn.safetensors"


def make_weights_as_stats(place):
    return place["model"] / "model.safetensors"


def make_constants(place):
    """A plan with constants whose statistics are gone."""
    plan = locum.plan(place["stats"], method="mone", remove=0.25, out=place.folder / "constants.json")
    moved = json.loads(plan.dumps())
    moved["provenance"] |= {"statistics_file": "gone.safetensors", "statistics": "0" * 16}
    (place.folder / "constants.json").write_text(json.dumps(moved))
    return place.folder / "constants.json"


def edited(place, change):
    plan = json.loads(place["plan"].read_text())
    change(plan, plan["layers"][0])
    (place.folder / "edited.json").write_text(json.dumps(plan))
    return place.folder / "edited.json"


def make_unknown_expert(place):
    return edited(
        place, lambda plan, layer: layer["experts"].append({"expert": 99, "parts": [{"part": "own_weights"}]})
    )


def make_too_many_experts(place):
    return edited(place, lambda plan, layer: layer["experts"].append({"expert": 8, "parts": [{"part": "own_weights"}]}))


def make_twice(place):
    return edited(place, lambda plan, layer: layer["experts"].append({"expert": 1, "parts": [{"part": "own_weights"}]}))


def make_lacks_expert(place):
    return edited(place, lambda plan, layer: layer["experts"].pop(3))


def make_rank_too_large(place):
    return edited(
        place,
        lambda plan, layer: layer["experts"][0].update(
            parts=[{"part": "shared_base", "base": 0}, {"part": "low_rank", "rank": 1000}]
        ),
    )


def make_too_few(place):
    drop = [
        {"expert": e, "parts": [{"part": "own_weights"}]} if e == 0 else {"expert": e, "dropped": True}
        for e in range(8)
    ]
    return edited(place, lambda plan, layer: layer.update(experts=drop, bases=[]))


def make_half_gone(place):
    return edited(place, lambda plan, layer: layer.update(dropped=True))


def make_layer_twice(place):
    return edited(place, lambda plan, layer: plan["layers"].append(layer))


def make_unknown_layer(place):
    return edited(place, lambda plan, layer: layer.update(layer="model.layers.77.mlp.experts"))


def make_unknown_fate(place):
    return edited(place, lambda plan, layer: layer["experts"][0].update(parts=[{"part": "own_weigths"}]))


def make_unknown_entry(place):
    return edited(place, lambda plan, layer: layer["experts"][0].update(part=[]))


def make_base_of_unknown(place):
    return edited(place, lambda plan, layer: layer["bases"][0]["experts"].__setitem__(0, 44))


def make_bad_weights(place):
    return edited(place, lambda plan, layer: layer["bases"][0]["weights"].__setitem__(0, 9.5))


def make_wordy_weights(place):
    return edited(place, lambda plan, layer: layer["bases"][0]["weights"].__setitem__(0, "much"))


def make_numeric_fate(place):
    return edited(place, lambda plan, layer: layer["experts"][0].update(parts=3))


def make_number_for_layers(place):
    return edited(place, lambda plan, layer: plan.update(layers=7))


def make_newer_plan(place):
    return edited(place, lambda plan, layer: plan.update(format_version=3))


def make_not_a_plan(place):
    (place.folder / "list.json").write_text("[1, 2]")
    return place.folder / "list.json"


def make_broken_plan(place):
    (place.folder / "broken.json").write_text(place["plan"].read_text()[:-9])
    return place.folder / "broken.json"


def make_binary_plan(place):
    (place.folder / "binary.json").write_bytes(b"\xff\xfe{}")
    return place.folder / "binary.json"


def make_empty(place):
    (place.folder / "empty.txt").write_text("\n \n")
    return place.folder / "empty.txt"


def make_short(place):
    (place.folder / "short.txt").write_text("Just a few words.")
    return place.folder / "short.txt"


def make_latin(place):
    (place.folder / "latin.txt").write_bytes("Grüße aus Köln".encode("latin-1"))
    return place.folder / "latin.txt"


def make_taken(place):
    """A folder by Locum, and a file in it that must stay."""
    return place.copy("pruned", "taken")


def make_foreign(place):
    (place.folder / "foreign").mkdir()
    (place.folder / "foreign" / "thesis.tex").write_text("years of work")
    return place.folder / "foreign"


def make_results(place):
    locum.evaluate(place["pruned"], data=str(place["words"]), length=64, tokens=256, out=place.folder / "rows.jsonl")
    return place.folder / "rows.jsonl"


def make_broken_results(place):
    rows = place["results"].read_text().splitlines()
    (place.folder / "broken.jsonl").write_text("\n".join([rows[0], rows[1][:50], rows[2]]))
    return place.folder / "broken.jsonl"


def make_no_results(place):
    (place.folder / "none.jsonl").write_text("")
    return place.folder / "none.jsonl"
