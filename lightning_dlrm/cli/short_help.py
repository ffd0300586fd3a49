"""``--help`` of the commands that read configurations: one screen, without loading torch. ``--help.all`` lists every
option."""

EVALUATIONS = ("validate", "test", "predict")
"""Commands that open a checkpoint."""

TRUST_HELP = (
    "let configurations name classes and functions of this module; may be repeated; has an effect on the command line "
    "only"
)

_CONFIGURATION = """\
  --config FILE              a YAML file; later files overlay earlier ones
  --data.path DIR            a dataset folder, or demo (generated data)"""

_CLASSES = """\
Any key of a YAML file is an option too, such as
--model.network.init_args.top_mlp '[512,256]'. --help.all lists all options;
--model.network.help DLRM and --data.help Criteo list the options of a class.
--trust MODULE lets a YAML file name classes of this module (SECURITY.md)."""


def _evaluation(command: str, more: str) -> str:
    """Return an example and the options of a command that opens a checkpoint.

    Args:
        command: its name.
        more: line of an option of this command alone.
    """
    return f"""\
example:
  python -m lightning_dlrm {command} --config runs/NAME/config.yaml \\
      --ckpt_path runs/NAME/checkpoints/best

options:
  --config FILE              the config.yaml of the run
  --ckpt_path PATH           such as runs/NAME/checkpoints/best
  --data.path DIR            another dataset folder with the same encoding
{more}
  --run_dir DIR              where results go (default: the checkpoint's run)
  --trainer.devices N        processes or GPUs
  --wandb.mode MODE          auto, online, offline or disabled

{_CLASSES}"""


_GROUP = "  --data.group COLUMN        also report the AUC by group of a kept column"
_SPLIT = "  --data.predict_split NAME  train, validation, test (default) or all"

SHORT_HELP = {
    "fit": f"""\
Train a model. A fit ends with a validation and leaves a run folder.

examples:
  python -m lightning_dlrm fit --config dlrm.yaml
  python -m lightning_dlrm fit --config dcn.yaml --config small.yaml
  python -m lightning_dlrm fit --config dlrm.yaml --data.path DIR
  python -m lightning_dlrm fit --config runs/try/config.yaml \\
      --run_dir runs/try --resume auto

options:
{_CONFIGURATION}
  --data.batch_size N        samples of a batch, over all ranks
  --run_dir DIR              default: runs/<date>-<model>-<n>
  --resume auto              continue --run_dir from its newest checkpoint
  --seed_everything N        seed of parameters and of the samples' order
  --trainer.max_epochs N     length of the fit; or --trainer.max_steps N
  --trainer.precision NAME   32-true, bf16-mixed, bf16-true or 64-true
  --trainer.devices N        ranks; for more than one also
                             --trainer.strategy embedding_sharded_ddp
  --model.compile true       compile the dense layers
  --stop_at_auc AUC          end after the first validation that reaches it
  --wandb.mode MODE          auto, online, offline or disabled
  --print_config             print the configuration of these options, and exit

{_CLASSES}""",
    "validate": f"Score a checkpoint on the validation split.\n\n{_evaluation('validate', _GROUP)}",
    "test": f"Score a checkpoint on the test split.\n\n{_evaluation('test', _GROUP)}",
    "predict": f"Write a checkpoint's click probabilities to predictions.parquet.\n\n{_evaluation('predict', _SPLIT)}",
    "params": f"""\
Count the parameters, FLOPs and bytes of a configuration; no table is made.

examples:
  python -m lightning_dlrm params --config dlrm.yaml
  python -m lightning_dlrm params --config deepfm.yaml --json
  python -m lightning_dlrm params --match dcn.yaml --to dlrm.yaml \\
      --by dense --output matched.yaml

options:
{_CONFIGURATION}
  --json                     print a JSON object
  --match FILE...            widen or narrow this model's hidden layers
  --to FILE...               configuration whose cost is matched
  --by COST                  total, dense (parameters), or flops (forward)
  --output FILE              where the matched configuration is written

{_CLASSES}""",
    "plan": f"""\
Show which rank would hold which rows, and what each would send.
With --device-memory: which tables, or which of their rows, stay in host memory.

examples:
  python -m lightning_dlrm plan --config dlrm.yaml --ranks 8
  python -m lightning_dlrm plan --config dlrm.yaml --ranks 8 --plot plan.png
  python -m lightning_dlrm plan --config dlrm.yaml --device-memory 1GiB \\
      --output places.yaml

options:
{_CONFIGURATION}
  --ranks N                  world size (default: as the Trainer's settings)
  --memory-per-rank SIZE     most memory of every rank: 80GiB, or one amount
                             for each: 24GiB,80GiB
  --wire TYPE                full or bf16: type of the vectors and gradients
                             that ranks send (default: full)
  --device-memory SIZE       memory of each device for tables, beside dense
                             layers and activations, which are not counted;
                             other rows stay on the host; not together with
                             --memory-per-rank, --plan, --plot or --wire
  --counted                  count the lookups of each row in the dataset
  --plan FILE                show the plan in this file
  --output FILE              write the plan, or what --device-memory chooses
  --plot FILE                draw the ranks' loads: .png, .svg or .pdf
  --json                     print a JSON object

{_CLASSES}""",
}
