"""`torchrun --nproc-per-node 2 -m vggfeat.training DATA …`: `vggfeat train` in several processes."""

from vggfeat_cli.learn import train
from vggfeat_cli.run import finish

if __name__ == "__main__":
    finish(train)
