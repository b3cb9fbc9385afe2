// Undo and redo: steps that are done and undone again, within a limit of memory.

const MOST = 64 << 20; // bytes of all steps; the oldest ones are forgotten
const STEPS = 200;

/** Return an empty past. A step is {undo, redo, bytes}. changed() is called after each change. */
export function newPast(changed = () => {}) {
  const steps = [];
  let at = 0; // steps before it are done
  const move = (by) => {
    if (by < 0 ? at === 0 : at === steps.length) return false;
    if (by < 0) steps[(at -= 1)].undo();
    else steps[(at += 1) - 1].redo();
    past.changed();
    return true;
  };
  const past = {
    changed,
    add(step) {
      steps.length = at;
      steps.push(step);
      let bytes = steps.reduce((sum, one) => sum + one.bytes, 0);
      while (steps.length > 1 && (bytes > MOST || steps.length > STEPS)) bytes -= steps.shift().bytes;
      at = steps.length;
      past.changed();
    },
    undo: () => move(-1),
    redo: () => move(1),
    canUndo: () => at > 0,
    canRedo: () => at < steps.length,
  };
  return past;
}
