// Spins in functions of known names for so many seconds.
function inner(n) {
  let sum = 0;
  for (let i = 0; i < n; i++) sum += Math.sqrt(i) % 3;
  return sum;
}

class Box {
  get size() {
    let sum = 0;
    for (let i = 0; i < 1e5; i++) sum += i % 7;
    return sum;
  }
}

function outer() {
  return inner(1e5) + new Box().size;
}

const end = Date.now() + 1000 * Number(process.argv[2]);
let total = 0;
while (Date.now() < end) total += outer();
