"""The word problems of `maths`: families of four calculations with the same numbers, nine templates each.

FAMILIES: name -> (draw, {sign: (calculation, templates)}). draw(rng) gives the numbers by name, such that all four calculations
give whole numbers; a calculation takes them by name. The order of templates says which split has them: see `maths.PARTS`.
"""


def _two(rng):
    b = rng.randrange(2, 40)
    return {"a": b * rng.randrange(2, 30), "b": b}


def _three(rng):
    c = rng.randrange(2, 30)
    return {"a": rng.randrange(3, 40), "b": c + rng.randrange(1, 30), "c": c}


def _percent(rng):
    return {"a": 20 * rng.randrange(2, 100), "b": 5 * rng.randrange(1, 16)}


def _row(rng):
    numbers = sorted(rng.sample(range(10, 200), 3))
    numbers[2] += -sum(numbers) % 3
    return {"low": numbers[0], "high": numbers[2], "b": numbers[1]}


def _sides(rng):
    return {"a": 2 * rng.randrange(3, 60), "b": rng.randrange(3, 80)}


def _shares(rng):
    b = rng.randrange(2, 25)
    c = b * rng.randrange(2, 12)
    return {"a": c + b * rng.randrange(c, c + 40), "b": b, "c": c}


FAMILIES = {
    "two numbers": (
        _two,
        {
            "a + b": (
                lambda a, b: a + b,
                (
                    "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
                    "There are {a} {things} on the table and {b} on the floor. How many {things} are there in all?",
                    "On Monday {name} counted {a} {things}, on Tuesday another {b}. How many were counted on both days?",
                    "A shelf holds {a} {things}; {name} adds {b}. How many {things} does the shelf hold then?",
                    "One bag weighs {a} kilograms and a second one {b} kilograms. How many kilograms do both weigh?",
                    "A train with {a} passengers stops; {b} people get on and nobody gets off. How many passengers are on it then?",
                    "A farmer has {a} brown hens and {b} white ones. How many hens is that in total?",
                    "{name} drives {a} kilometres before lunch and {b} kilometres after it. How many kilometres is the whole drive?",
                    "A choir of {a} singers and another of {b} singers give a concert together. How many singers take part?",
                ),
            ),
            "a - b": (
                lambda a, b: a - b,
                (
                    "{name} had {a} {things} and lost {b} of them. How many {things} are left?",
                    "A shop has {a} {things} and sells {b}. How many {things} remain?",
                    "Of {a} {things} in a box, {b} are broken. How many are whole?",
                    "{name} needs {a} {things} and has {b} already. How many are still missing?",
                    "A tank holds {a} litres of water and {b} litres run out. How many litres stay in it?",
                    "A library owns {a} novels, and {b} of them are lent out. How many novels are still in the library?",
                    "One tower is {a} metres high, another {b} metres. By how many metres is the first one higher?",
                    "{a} runners start a race, and {b} of them give up on the way. How many runners reach the finish?",
                    "A memory card has room for {a} photos, and {b} are on it already. How many more photos fit on it?",
                ),
            ),
            "a * b": (
                lambda a, b: a * b,
                (
                    "A crate holds {a} {things}. How many {things} are in {b} crates?",
                    "{name} collects {a} {things} every day. How many {things} is that in {b} days?",
                    "There are {b} rooms with {a} {things} in each. How many {things} are there altogether?",
                    "Each of {b} children brings {a} {things}. How many {things} do they bring?",
                    "A ticket costs {a} euros. How many euros do {b} tickets cost?",
                    "A printer prints {a} pages a minute. How many pages does it print in {b} minutes?",
                    "An orchard has {b} rows of {a} trees. How many trees grow in it?",
                    "{name} swims {b} lengths of a pool that is {a} metres long. How many metres does {name} swim?",
                    "A recipe for one cake takes {a} grams of flour. How many grams of flour do {b} such cakes take?",
                ),
            ),
            "a / b": (
                lambda a, b: a / b,
                (
                    "{name} shares {a} {things} equally among {b} friends. How many does each friend get?",
                    "{a} {things} are packed into {b} equal boxes. How many {things} are in a box?",
                    "{name} puts {a} {things} into bags of {b}. How many bags are filled?",
                    "{b} workers carry {a} {things}, all the same number. How many does one worker carry?",
                    "A rope of {a} metres is cut into {b} pieces of the same length. How many metres long is a piece?",
                    "For a sports day {a} pupils form {b} teams of the same size. How many pupils are in a team?",
                    "{b} chairs of the same price cost {a} euros in all. How many euros does one chair cost?",
                    "A machine fills {a} jars in {b} hours, always equally many an hour. How many jars does it fill in one hour?",
                    "A lift takes {b} people at a time. How many rides are needed for {a} people?",
                ),
            ),
        },
    ),
    "three numbers": (
        _three,
        {
            "a * b + c": (
                lambda a, b, c: a * b + c,
                (
                    "{name} buys {a} boxes of {b} {things} and then {c} single ones. How many {things} is that?",
                    "There are {a} rows of {b} {things}, and {c} more beside them. How many {things} are there?",
                    "{name} works {a} days for {b} euros a day and gets {c} euros on top. How many euros is that in all?",
                    "A bus makes {a} trips with {b} people each and a last one with {c}. How many people does it carry?",
                    "{name} reads {b} pages on each of {a} days and {c} pages on Sunday. How many pages are read?",
                    "A baker fills {a} trays with {b} rolls each and has {c} rolls left over. How many rolls were baked?",
                    "A train has {a} coaches of {b} seats each, plus a dining car of {c} seats. How many seats does it have?",
                    "Renting a boat costs {b} euros an hour plus a fee of {c} euros, paid once. How many euros do {a} hours cost?",
                    "A song has {a} verses of {b} seconds each and an ending of {c} seconds. How many seconds does it last?",
                ),
            ),
            "a * b - c": (
                lambda a, b, c: a * b - c,
                (
                    "{name} buys {a} boxes of {b} {things} and then loses {c} {things}. How many are left?",
                    "There were {a} rows of {b} {things}; {c} of the {things} were taken away. How many stayed?",
                    "{name} earns {b} euros on each of {a} days and spends {c} euros at the end. How many euros remain?",
                    "A hall has {a} rows of {b} seats, of which {c} seats are taken. How many seats are free?",
                    "{a} trucks bring {b} sacks each, and {c} of all these sacks are torn. How many sacks are not?",
                    "{name} sows {a} beds with {b} seeds each, but birds eat {c} seeds in all. How many seeds are left to grow?",
                    "A club buys {a} chairs at {b} euros each, and {c} euros are taken off the total. How many euros does it pay?",
                    "A cyclist plans {a} stages of {b} kilometres each and has ridden {c} kilometres so far. How many kilometres are left?",
                    "A film is made of {a} scenes of {b} minutes each, then {c} minutes are cut out of it. How many minutes does it last?",
                ),
            ),
            "a * (b + c)": (
                lambda a, b, c: a * (b + c),
                (
                    "Each of {a} boxes holds {b} red and {c} blue {things}. How many {things} are in the boxes?",
                    "{name} does {b} exercises every morning and {c} every evening. How many is that in {a} days?",
                    "A meal costs {b} euros and a drink {c} euros. How many euros do {a} people pay who have both?",
                    "{a} teams have {b} players and {c} reserves each. How many people is that in all teams?",
                    "Every week {name} saves {b} euros, and {c} euros more from a second job. How much is it in {a} weeks?",
                    "A hotel has {a} floors, each with {b} double rooms and {c} single rooms. How many rooms does the hotel have?",
                    "A bus line is {b} kilometres out and {c} kilometres back. How many kilometres are {a} round trips?",
                    "A cake takes {b} grams of butter and {c} grams of sugar. How many grams of both together do {a} cakes take?",
                    "A magazine has {b} pages of text and {c} pages of pictures. How many pages are printed for {a} copies?",
                ),
            ),
            "a * (b - c)": (
                lambda a, b, c: a * (b - c),
                (
                    "Each of {a} boxes held {b} {things}, and {c} were taken out of every box. How many {things} are left?",
                    "{name} earns {b} euros a day and spends {c} euros a day. How many euros are saved in {a} days?",
                    "A shirt costs {b} euros and is now {c} euros cheaper. How many euros do {a} shirts cost now?",
                    "In each of {a} classes of {b} pupils, {c} pupils are ill. How many pupils are well?",
                    "Every hour {b} litres flow into a pool and {c} litres out of it. How many litres are gained in {a} hours?",
                    "A trader buys rugs for {c} euros each and sells them for {b} euros each. How many euros of profit do {a} rugs bring?",
                    "An old lamp takes {b} watts, a new one {c} watts. How many watts are saved by replacing {a} old lamps?",
                    "An outer lap is {b} metres, an inner lap {c} metres. How many metres more are {a} outer laps than {a} inner ones?",
                    "{name} peels {a} potatoes of {b} grams each; every one loses {c} grams of skin. How many grams are left in all?",
                ),
            ),
        },
    ),
    "percent": (
        _percent,
        {
            "b% of a": (
                lambda a, b: a * b / 100,
                (
                    "{name} has {a} {things}; {b} percent of them are new. How many new {things} are there?",
                    "A tax of {b} percent is paid on {a} euros. How many euros is the tax?",
                    "Of {a} people in a village, {b} percent are children. How many children live there?",
                    "{b} percent of {a} {things} were sold. How many {things} were sold?",
                    "A bank pays {b} percent a year. How many euros of interest do {a} euros bring in one year?",
                    "A school has {a} pupils, and {b} percent of them play an instrument. How many pupils play one?",
                    "{name} drives {a} kilometres, {b} percent of them on motorways. How many kilometres are on motorways?",
                    "A farmer grows wheat on {b} percent of {a} hectares of land. How many hectares of wheat is that?",
                    "A download has {a} megabytes, and {b} percent of it is done. How many megabytes are done?",
                ),
            ),
            "a - b%": (
                lambda a, b: a - a * b / 100,
                (
                    "A bicycle of {a} euros becomes {b} percent cheaper. How many euros does it cost now?",
                    "{name} had {a} {things} and gave {b} percent of them away. How many {things} are left?",
                    "A town of {a} people shrinks by {b} percent. How many people live there then?",
                    "From a wage of {a} euros, {b} percent go to tax. How many euros are paid out?",
                    "A forest of {a} trees loses {b} percent of them in a storm. How many trees still stand?",
                    "Of {a} seats in a theatre, {b} percent are taken. How many seats are free?",
                    "A file of {a} kilobytes is made {b} percent smaller. How many kilobytes does it have then?",
                    "{a} pupils took a test, and {b} percent of them failed. How many pupils passed?",
                    "{a} grams of mushrooms lose {b} percent of their weight when they dry. How many grams do they weigh then?",
                ),
            ),
            "a + b%": (
                lambda a, b: a + a * b / 100,
                (
                    "A rent of {a} euros rises by {b} percent. How many euros is the new rent?",
                    "A club of {a} members grows by {b} percent. How many members does it have then?",
                    "{name} pays {a} euros and a tip of {b} percent. How many euros does {name} pay in all?",
                    "A factory made {a} {things} a day and now makes {b} percent more. How many does it make now?",
                    "The price of {a} euros is without a tax of {b} percent. How many euros is it with the tax?",
                    "A festival had {a} visitors last year. This year the number is {b} percent higher. How many visitors came this year?",
                    "A recipe for {a} grams of dough is enlarged by {b} percent. How many grams of dough does it give now?",
                    "A loan of {a} euros is paid back after a year with {b} percent interest on top. How many euros are paid back?",
                    "A road is {a} kilometres long, and the detour around it is {b} percent longer. How many kilometres is the detour?",
                ),
            ),
            "2 * b% of a": (
                lambda a, b: 2 * a * b / 100,
                (
                    "A bank pays {b} percent a year, always on the first {a} euros. How much interest is that in two years?",
                    "{b} percent of {a} {things} are red and as many are blue. How many are red or blue?",
                    "In each of two towns of {a} people, {b} percent vote. How many votes is that together?",
                    "A fee of {b} percent of {a} euros is paid twice. How many euros are paid in fees?",
                    "Two schools have {a} pupils each, and {b} percent of these walk there. How many pupils walk?",
                    "A hotel has {a} guests; {b} percent eat soup at lunch, and as many do at dinner. How many bowls of soup is that?",
                    "{name} gets {b} percent of {a} euros as a bonus, and the manager gets double that. How much does the manager get?",
                    "Of {a} trees in a park, {b} percent are oaks, and each oak gets two nest boxes. How many nest boxes is that?",
                    "Of a wage of {a} euros a month {name} saves {b} percent. How many euros are saved in two months?",
                ),
            ),
        },
    ),
    "a row": (
        _row,
        {
            "sum": (
                lambda low, high, b: low + high + b,
                (
                    "{name} finds {low}, {b} and {high} {things}. How many {things} are found altogether?",
                    "Three classes have {b}, {high} and {low} {things}. How many {things} do they have together?",
                    "A driver goes {high}, then {low}, then {b} kilometres. How many kilometres is the whole way?",
                    "Three bills are {low}, {high} and {b} euros. How many euros must be paid?",
                    "Three sacks weigh {b}, {low} and {high} kilograms. How heavy are the sacks on one scale, in kilograms?",
                    "A film has three parts of {low}, {high} and {b} minutes. How many minutes does the whole film run?",
                    "A library bought {b} novels, {low} atlases and {high} dictionaries. How many books did it buy?",
                    "A cook mixes {high} grams of flour, {b} of butter and {low} of sugar. How many grams does the dough weigh?",
                    "In a vote the zoo gets {low} votes, the lake {high} and the castle {b}. How many votes were cast?",
                ),
            ),
            "mean": (
                lambda low, high, b: (low + high + b) / 3,
                (
                    "{name} found {low}, {b} and {high} {things} on three days. How many is that a day on average?",
                    "Three friends have {b}, {high} and {low} {things} and share them equally. How many does each get?",
                    "Three tests gave {high}, {low} and {b} points. What is the mean number of points?",
                    "A baker sold {low}, {high} and {b} loaves in three hours. What is the average for an hour?",
                    "Three plants are {b}, {low} and {high} centimetres high. What is their mean height in centimetres?",
                    "Three runs of a program took {b}, {high} and {low} seconds. How many seconds did a run take on average?",
                    "Three jugs hold {low}, {b} and {high} decilitres and are evened out until all hold the same. How much is in each?",
                    "On three evenings a theatre had {high}, {b} and {low} visitors. What was the average number of visitors an evening?",
                    "In three months {low}, {high} and {b} millimetres of rain fell. What is the mean for a month in millimetres?",
                ),
            ),
            "range": (
                lambda low, high, b: high - low,
                (
                    "{name} found {low}, {b} and {high} {things}. How many more are the most than the fewest?",
                    "Three ropes are {b}, {high} and {low} metres long. By how much is the longest longer than the shortest?",
                    "Three tests gave {high}, {low} and {b} points. How far is the best above the worst?",
                    "Three shops ask {low}, {high} and {b} euros. How many euros does the cheapest save over the dearest?",
                    "Three people are {b}, {low} and {high} months in a firm. How many months lie between the newest and the oldest?",
                    "Three villages got {low}, {b} and {high} millimetres of rain. How much more fell in the wettest than in the driest?",
                    "Three runners need {b}, {low} and {high} seconds. How many seconds does the fastest finish before the slowest?",
                    "Three trains carry {low}, {high} and {b} passengers. How many more are in the fullest than in the emptiest train?",
                    "Three files have {high}, {low} and {b} megabytes. By how many megabytes do the biggest and the smallest differ?",
                ),
            ),
            "two largest": (
                lambda low, high, b: high + b,
                (
                    "{name} found {low}, {b} and {high} {things}. How many are the two largest finds together?",
                    "Three ropes are {b}, {high} and {low} metres long. How long are the two longest, end to end?",
                    "Three tests gave {high}, {low} and {b} points; the worst is left out. How many points are the rest?",
                    "Three coats cost {low}, {high} and {b} euros, and the cheapest is free. How many euros are to be paid?",
                    "Three crates weigh {b}, {low} and {high} kilograms. How heavy are the two heavier ones together?",
                    "Three clubs have {low}, {high} and {b} fans in a hall, and the smallest group goes home. How many fans stay?",
                    "Three packets have {b}, {low} and {high} grams of rice. A cook uses all but the smallest. How many grams are used?",
                    "Three fields give {low}, {b} and {high} sacks of corn. How many sacks do the two best fields give?",
                    "Three buses have {high}, {low} and {b} seats. A school takes the two biggest. How many seats is that?",
                ),
            ),
        },
    ),
    "sides": (
        _sides,
        {
            "area": (
                lambda a, b: a * b,
                (
                    "A garden is {a} metres long and {b} metres wide. How many square metres is it?",
                    "What is the area of a rectangle with sides {a} and {b}?",
                    "A floor of {a} by {b} metres gets a carpet. How many square metres of carpet are needed?",
                    "A wall is {b} metres high and {a} metres long. How many square metres are to be painted?",
                    "{name} lays tiles of one square metre on a yard of {a} by {b} metres. How many tiles is that?",
                    "A print fills a sheet of {a} by {b} centimetres. How many square centimetres does it cover?",
                    "A screen is {a} pixels wide and {b} pixels high. How many pixels does it have?",
                    "A bar of chocolate is {a} pieces long and {b} pieces wide. How many pieces does it have?",
                    "An ice rink is {b} metres from side to side and {a} metres from end to end. How many square metres of ice is that?",
                ),
            ),
            "perimeter": (
                lambda a, b: 2 * (a + b),
                (
                    "A garden is {a} metres long and {b} metres wide. How many metres of fence go around it?",
                    "What is the perimeter of a rectangle with sides {a} and {b}?",
                    "{name} walks once around a field of {a} by {b} metres. How many metres is that?",
                    "A picture of {b} by {a} centimetres gets a frame. How many centimetres long is its edge?",
                    "A ribbon is sewn along all four edges of a cloth of {a} by {b} centimetres. How long is it?",
                    "A flat roof of {a} by {b} metres gets a string of lights all around its edge. How many metres is the string?",
                    "An ant crawls around the edge of a table of {a} by {b} centimetres until it is back at its start. How far is that?",
                    "{name} draws the outline of a rectangle, {a} centimetres wide and {b} centimetres high. How long is the line in all?",
                    "A castle yard has two walls of {a} metres and two of {b} metres. How many metres of wall is that?",
                ),
            ),
            "two sides": (
                lambda a, b: a + b,
                (
                    "{name} walks along the length of a field, {a} metres, then along its width, {b} metres. How far is that?",
                    "A rectangle has sides {a} and {b}. How long are one long and one short side together?",
                    "A pipe follows two walls of a room, {a} and {b} metres, from corner to corner. How long is the pipe?",
                    "A shelf runs along a wall of {b} and around the corner along one of {a} metres. How long is it?",
                    "An L is drawn with arms of {a} and {b} centimetres. How many centimetres is the line?",
                    "A ship sails {a} kilometres north and then {b} kilometres east. How many kilometres has it sailed?",
                    "A cable runs {b} metres up a wall and then {a} metres along the ceiling. How many metres of cable is that?",
                    "A hedge grows on two touching sides of a park, one of {a} and one of {b} metres. How many metres of hedge is that?",
                    "A robot follows one edge of a board for {a} centimetres, turns and follows the next for {b}. How far does it go?",
                ),
            ),
            "triangle": (
                lambda a, b: a * b / 2,
                (
                    "A garden of {a} by {b} metres is cut in two along its diagonal. How many square metres is one part?",
                    "What is the area of a triangle with base {a} and height {b}?",
                    "Half of a floor of {a} by {b} metres gets a carpet. How many square metres of carpet are needed?",
                    "A sail is a triangle, {b} metres high and {a} metres wide at the foot. How many square metres is it?",
                    "A right-angled triangle has legs of {a} and {b} centimetres. What is its area in square centimetres?",
                    "A triangular sign takes up half of a board of {a} by {b} centimetres. How many square centimetres is the sign?",
                    "A flag of {a} by {b} centimetres is half red and half white. How many square centimetres are red?",
                    "Two farmers divide a meadow of {a} by {b} metres into equal areas. How many square metres does each of them get?",
                    "A cheese slice of {a} by {b} millimetres is halved from corner to corner. How many square millimetres is a half?",
                ),
            ),
        },
    ),
    "shares": (
        _shares,
        {
            "(a - c) / b": (
                lambda a, b, c: (a - c) / b,
                (
                    "{name} has {a} {things}, keeps {c} and shares the rest equally among {b} friends. How many does each get?",
                    "Of {a} {things}, {c} are broken; the others go into {b} equal boxes. How many are in a box?",
                    "A prize of {a} euros, less costs of {c} euros, goes to {b} winners in equal parts. How much is one part?",
                    "{c} of {a} seats are reserved; {b} groups get equally many of the other seats. How many has a group?",
                    "From {a} litres, {c} are spilt, and what is left fills {b} cans alike. How many litres are in a can?",
                    "{name} has read {c} of a book's {a} pages and reads the rest in {b} equal parts. How many pages are in a part?",
                    "A train weighs {a} tonnes: the engine {c} tonnes, the {b} equal wagons the rest. How many tonnes is a wagon?",
                    "A piano costs {a} euros; {c} are paid at once, the rest in {b} equal instalments. How many euros is one instalment?",
                    "A farmer sells {c} of {a} sheep and puts the others into {b} pens, equally many in each. How many are in a pen?",
                ),
            ),
            "(a + c) / b": (
                lambda a, b, c: (a + c) / b,
                (
                    "{name} has {a} {things}, gets {c} more and shares all equally among {b} friends. How many does each get?",
                    "{a} old and {c} new {things} are put into {b} equal boxes. How many are in a box?",
                    "A prize of {a} euros is raised by {c} euros, then {b} winners share it equally. How much is one part?",
                    "{a} pupils and {c} parents ride in {b} buses, equally many in each. How many people are in a bus?",
                    "{a} litres of juice and {c} litres of water are mixed and fill {b} cans alike. How many litres are in a can?",
                    "A library with {a} books gets {c} more and spreads all evenly over {b} shelves. How many books are on a shelf?",
                    "A meal costs {a} euros and the drinks {c} euros; {b} guests split the bill evenly. How many euros does each pay?",
                    "A tour leads {a} kilometres to the sea and then {c} along it, in {b} equal stages. How many kilometres is a stage?",
                    "{a} files from one computer and {c} from another are spread evenly over {b} disks. How many files are on a disk?",
                ),
            ),
            "a / b - c": (
                lambda a, b, c: a / b - c,
                (
                    "{b} friends share {a} {things} equally, then one of them gives {c} away. How many has this one left?",
                    "{a} {things} go into {b} equal boxes; from one box {c} are taken. How many does that box hold now?",
                    "{b} winners share {a} euros equally; {name}, one of them, spends {c} euros. How many euros has {name} left?",
                    "{a} pages are split equally over {b} days; {name} has read {c} of today's. How many are left for today?",
                    "{b} cans are filled alike from {a} litres, and {c} litres leak out of one. How many litres stay in that can?",
                    "{a} hens live in {b} barns, equally many in each; {c} run away from one barn. How many are left in that barn?",
                    "{b} people split a bill of {a} euros evenly; {name}, one of them, has paid {c} euros. How much does {name} still owe?",
                    "A wire of {a} centimetres is cut into {b} equal pieces, and one is shortened by {c} centimetres. How long is it now?",
                    "{b} clocks of the same price cost {a} euros in all; then one is made {c} euros cheaper. What does that one cost now?",
                ),
            ),
            "a / b + c": (
                lambda a, b, c: a / b + c,
                (
                    "{b} friends share {a} {things} equally; {name}, one of them, already had {c}. How many has {name} now?",
                    "{a} {things} go into {b} equal boxes; into one box {c} more are put. How many does that box hold now?",
                    "{b} winners share {a} euros equally; {name}, one of them, also gets {c} euros. How much does {name} get?",
                    "{a} pages are split equally over {b} days; today {name} reads {c} extra. How many pages are read today?",
                    "{b} cans are filled alike from {a} litres; {c} litres are added to one. How many litres are in that can?",
                    "A train's {b} coaches hold {a} passengers, equally many each; then {c} people board the last. How many are in it now?",
                    "{b} tenants split {a} euros of rent evenly; {name}, one of them, adds {c} for parking. How much does {name} pay?",
                    "A baker divides {a} grams of dough into {b} equal loaves and adds {c} grams of nuts to one. How heavy is that loaf?",
                    "{b} equal machines weigh {a} kilograms in all; one is packed in {c} kilograms of wood. How heavy is this parcel?",
                ),
            ),
        },
    ),
}
