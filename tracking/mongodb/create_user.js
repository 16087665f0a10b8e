// Run by the mongo image when the volume is empty: the user that run_experiment.py and Omniboard use.
db.getSiblingDB("admin").createUser({
  user: "sacred",
  pwd: process.env.SACRED_PASSWORD,
  roles: [{ role: "readWrite", db: "sacred" }],
});
