"""The pick scene as MJCF text, and its few constants. Read by `env.PickEnv`, by the expert and by the renderer probe.

A gantry-mounted gripper (three slides and two fingers) over a table; a 4 cm cube; a front and a wrist camera.
The shaft collides with nothing, by contype 2 rather than 0: `mj_multiRay` culls a body by the bounds of its colliding
geoms. Nearly rigid contacts with elliptic cones, so that a light cube does not slip while the hand accelerates.
"""

FINGER_TRAVEL = 0.045
"""Stroke of one finger in metres; 0 is open."""

CUBE_HALF = 0.02
"""Half the edge of the cube in metres; its height at rest."""

SCENE = f"""
<mujoco model="pick">
 <option timestep="0.004" integrator="implicitfast" cone="elliptic" impratio="5"/>
 <visual><headlight ambient=".36 .36 .36" diffuse=".06 .06 .06" specular="0 0 0"/></visual>
 <default>
  <geom condim="4" friction="1.2 0.02 0.001" solref="0.008 1"/>
  <joint damping="40" armature="0.05"/>
 </default>
 <asset>
  <texture name="sky" type="skybox" builtin="flat" rgb1=".45 .6 .75" rgb2=".45 .6 .75" width="8" height="48"/>
 </asset>
 <worldbody>
  <light pos="0 -0.5 1.5" dir="-.3 .2 -.93" type="directional" diffuse=".6 .6 .6" specular="0 0 0"/>
  <camera name="front" pos="0 -0.75 0.55" xyaxes="1 0 0 0 0.62 0.78" fovy="42"/>
  <geom name="table" type="box" size="0.3 0.3 0.02" pos="0 0 -0.02" rgba=".72 .66 .58 1"/>
  <geom type="box" size="0.02 0.02 0.3" pos="-.34 .3 0.28" rgba=".3 .3 .34 1" contype="0" conaffinity="0"/>
  <geom type="box" size="0.02 0.02 0.3" pos=".34 .3 0.28" rgba=".3 .3 .34 1" contype="0" conaffinity="0"/>
  <geom type="box" size="0.36 0.02 0.02" pos="0 .3 0.58" rgba=".3 .3 .34 1" contype="0" conaffinity="0"/>
  <body name="hand" pos="0 0 0.2" gravcomp="1">
   <joint name="x" type="slide" axis="1 0 0" range="-.22 .22"/>
   <joint name="y" type="slide" axis="0 1 0" range="-.22 .22"/>
   <joint name="z" type="slide" axis="0 0 1" range="-.2 .2"/>
   <geom type="cylinder" size="0.018 0.12" pos="0 0 0.2" rgba=".85 .85 .88 1" mass="0.2" contype="2" conaffinity="0"/>
   <geom type="box" size="0.055 0.022 0.02" pos="0 0 0.07" rgba=".2 .45 .8 1" mass="0.3"/>
   <camera name="wrist" pos="0 -0.09 0.11" xyaxes="1 0 0 0 0.80 0.6" fovy="75"/>
   <site name="tcp" pos="0 0 0" group="4"/>
   <body name="left_finger" pos="-0.045 0 0.02" gravcomp="1">
    <joint name="left" type="slide" axis="1 0 0" range="0 {FINGER_TRAVEL}" damping="5"/>
    <geom type="box" size="0.006 0.014 0.035" rgba=".1 .1 .12 1" mass="0.05"/>
   </body>
   <body name="right_finger" pos="0.045 0 0.02" gravcomp="1">
    <joint name="right" type="slide" axis="-1 0 0" range="0 {FINGER_TRAVEL}" damping="5"/>
    <geom type="box" size="0.006 0.014 0.035" rgba=".1 .1 .12 1" mass="0.05"/>
   </body>
  </body>
  <body name="cube" pos="0 0 {CUBE_HALF}">
   <freejoint name="cube"/>
   <geom name="cube" type="box" size="{CUBE_HALF} {CUBE_HALF} {CUBE_HALF}" mass="0.05" rgba=".85 .15 .15 1"/>
  </body>
 </worldbody>
 <actuator>
  <position joint="x" kp="1200" ctrlrange="-.22 .22"/>
  <position joint="y" kp="1200" ctrlrange="-.22 .22"/>
  <position joint="z" kp="1200" ctrlrange="-.2 .2"/>
  <position joint="left" kp="300" ctrlrange="0 {FINGER_TRAVEL}" forcerange="-8 8"/>
  <position joint="right" kp="300" ctrlrange="0 {FINGER_TRAVEL}" forcerange="-8 8"/>
 </actuator>
</mujoco>
"""
