// Spins in functions of known names for so many seconds, and says when they are compiled.
public class Spin {
    static double leaf(int n) {
        double sum = 0;
        for (int i = 0; i < n; i++) sum += Math.sqrt(i) % 3;
        return sum;
    }

    public static void main(String[] arguments) {
        long end = System.nanoTime() + 1_000_000_000L * Long.parseLong(arguments[0]);
        double total = 0;
        for (int i = 0; System.nanoTime() < end; i++) {
            total += leaf(100_000);
            if (i == 500) System.out.println("compiled");
        }
        System.out.println(total);
    }
}
