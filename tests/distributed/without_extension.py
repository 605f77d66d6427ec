"""`without_extension.py SCRIPT ARGUMENTS`: runs the script where DeepSpeed talks by gloo, not by its C++ extension.

On a CPU DeepSpeed compiles an extension for all-reduce in shared memory, again for every environment and for more than
a minute; and when a process is killed meanwhile, its lock stays and everybody after it waits for ever. The sums are the
same.
"""

import runpy
import sys

import deepspeed.ops


deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
del sys.argv[0]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
