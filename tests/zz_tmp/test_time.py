import time
from pathlib import Path
import pytest
def test_x(tiny_model, write_lora, tmp_path):
    from glance_trt.build import build
    (tmp_path/"model").symlink_to(tiny_model)
    write_lora(tmp_path/"slow.safetensors", seed=1)
    write_lora(tmp_path/"fast.safetensors", seed=2, targets=("to_k","conv1"))
    r=tmp_path/"r.yaml"; r.write_text("""
name: tiny
model: model
height: 16
width: 16
teacher_steps: 10
phases:
  - {name: slow, steps: [1,3], lora: {file: slow.safetensors}}
  - {name: middle, steps: [5]}
  - {name: fast, steps: [6,8,10], lora: {file: fast.safetensors}}
guidance: {scale: 3.0, rescale: 0.5}
""")
    t=time.process_time(); calls=[]
    rep=build(str(r),tmp_path/"x.bundle",engines=["cpu"],progress=lambda s,d,n: calls.append((round(time.process_time()-t,2),s,d,n)))
    print(rep.seconds, rep.parity)
    for c in calls: print(c)
    print(sorted((p.name,p.stat().st_size) for p in (tmp_path/"x.bundle").iterdir()))
    t=time.process_time(); rep=build(str(r),tmp_path/"x.bundle",engines=["cpu"]); print(rep.unchanged,time.process_time()-t)
    from glance_trt import recipe
    from glance_trt.export.reference import DiffusersReference
    from glance_trt.runtime.pipeline import Pipeline
    from glance_trt.verify import psnr
    import numpy as np
    ref=DiffusersReference(*recipe.load(r)); pipe=Pipeline.open(tmp_path/"x.bundle")
    for seed in range(3):
        print(psnr(np.asarray(pipe.generate("a red circle",seed=seed)[0]), ref.generate("a red circle",[seed])[0]))
    print(time.process_time()-t, [p.name for p in tmp_path.iterdir()])
