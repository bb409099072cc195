"""The adapter of a finished run in the files that PEFT reads: RUN/peft/.

    python data/export.py RUN          (make export RUN=out/sample/tiny/cls_p/seed42)

What PEFT has no place for goes into beside.safetensors: user tokens, and the head of an
encoder-decoder; users and labels stand in its metadata, in order.
"""
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import plm  # noqa: E402


def export(folder):
    """Writes adapter_config.json, adapter_model.safetensors and beside.safetensors; says so."""
    m, model, _, users = plm.load_run(folder)
    plm.check(m["tune"] == "lora", f"{folder}: every weight was trained: there is no adapter")
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.trainable().items()}
    layers = sorted({name.rpartition(".")[2] for name, layer in model.named_modules()
                     if isinstance(layer, plm.LoRALinear)})
    task = "SEQ_2_SEQ_LM" if model.seq2seq else "SEQ_CLS" if model.head == "cls" else "CAUSAL_LM"
    config = dict(peft_type="LORA", task_type=task, target_modules=layers, r=m["r"],
                  lora_alpha=m["alpha"], lora_dropout=m["dropout"], bias="none",
                  inference_mode=True,
                  base_model_name_or_path=plm.MODELS.get(m["model"], m["model"]),
                  modules_to_save=["score"] if task == "SEQ_CLS" else None)
    adapter = {f"base_model.model.{name.removeprefix('lm.')}.weight": t
               for name, t in tensors.items() if ".lora_" in name}
    beside = {name: t for name, t in tensors.items() if ".lora_" not in name}
    if task == "SEQ_CLS":
        adapter["base_model.model.score.weight"] = beside.pop("score.weight")
    os.makedirs(f"{folder}/peft", exist_ok=True)
    plm.write_file(f"{folder}/peft/adapter_config.json", config)
    plm.write_file(f"{folder}/peft/adapter_model.safetensors",
               plm.safetensors_bytes(adapter, {"format": "pt"}))
    plm.write_file(f"{folder}/peft/beside.safetensors", plm.safetensors_bytes(
        beside, {"users": json.dumps(users), "labels": json.dumps(m["labels"])}))
    print(f"{folder}/peft: adapter_config.json and adapter_model.safetensors for PeftModel; "
          f"beside.safetensors with {', '.join(beside) or 'nothing'} (users and labels, in order, "
          "are in its metadata)")


if __name__ == "__main__":
    try:
        if len(sys.argv) != 2:
            raise plm.BadInput("one argument: the folder of a finished run")
        export(sys.argv[1])
    except (plm.BadInput, OSError) as e:
        print(f"export.py: {e}", file=sys.stderr)
        sys.exit(2)
